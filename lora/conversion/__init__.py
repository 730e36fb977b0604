"""Configuration files of axolotl, LLaMA-Factory and torchtune as settings of ours."""
