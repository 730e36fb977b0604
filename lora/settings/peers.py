"""Settings of PEFT, TRL, LLaMA-Factory, axolotl and mlx-lm by name, and what they are here.

One table for flags, YAML keys and converted files. A setting with the same meaning is an alias; one
with another meaning is refused with the settings to write instead. In texts, `name` is a setting of
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FORMER_NAMES = {"micro_batches": "gradient_accumulation"}
"""Settings by their name in older versions, which flags, files and run records may still have."""

Settings = Mapping[str, str]
"""Setting to its value as text, names with underscores."""


@dataclass(frozen=True)
class PeerSetting:
    """What a setting of another tool is here: an alias of `ours`, or, with `because`, refused."""

    ours: str | None = None
    values: Settings = field(default_factory=dict)
    """Its values that are written otherwise here; others stay."""
    note: str = ""
    """Of an alias: what its user should know."""
    note_about: str = ""
    """The setting that `note` is about: whoever gives it need not be told."""
    refused: Settings = field(default_factory=dict)
    """Of an alias: values that are not taken, each with the reason; "*" is any that is not among
    `values`."""
    gives_way: str = ""
    """Of an alias: the value of ours that another name of the same setting overrides, as
    load_in_8bit: false beside load_in_4bit: true, or bnb_4bit_quant_type: nf4 beside
    load_in_4bit: false."""
    because: str = ""
    """Why it is not taken."""
    instead: Callable[[str, Settings], Settings] = lambda value, others: {}
    """(its value, the other settings given) -> what to write instead; empty where there is none."""
    beside: str | None = None
    """What it is in commands that answer, and so do not have `ours` or what `because` names."""

    def why_refused(self, value: str) -> str:
        """Return why this value of an alias is not taken; "" if it is."""
        known = value.lower()
        if not self.refused or known in self.values:
            return ""
        return self.refused.get(known, self.refused.get("*", ""))


def _whole(text: str | None) -> int:
    """Return the number in `text`, 0 if there is none."""
    return int(text) if text is not None and text.strip().isdigit() else 0


def _first(others: Settings, *names: str) -> int:
    return next((n for name in names if (n := _whole(others.get(name)))), 0)


def _effective_batch(value: str, others: Settings) -> Settings:
    per_device, parts = _whole(value), _first(others, *_ACCUMULATIONS, "gradient_accumulation") or 1
    if not per_device:
        return {}
    size = {"batch_size": str(per_device * parts)}
    return size if parts == 1 else {**size, "gradient_accumulation": str(parts)}


def _warmup_fraction(value: str, others: Settings) -> Settings:
    steps = _first(others, "steps", "max_steps", "iters")
    return {"warmup_fraction": f"{_whole(value) / steps:.3g}"} if steps else {}


def _directory_and_name(value: str, others: Settings) -> Settings:
    parent, _, name = value.rstrip("/").rpartition("/")
    return {"out": parent or ("/" if value.startswith("/") else "."), "name": name} if name else {}


def _trackers(value: str, others: Settings) -> Settings:
    return {"tensorboard": "true"} if value in ("tensorboard", "all") else {}


def _whole_model(value: str, others: Settings) -> Settings:
    return {"full": "true"} if value in ("full", "none") else {}


def _resumed(value: str, others: Settings) -> Settings:
    parts = value.rstrip("/").split("/checkpoint")[0]
    return {"resume": "true", **_directory_and_name(parts, others)} if "/" in value else {}


_BOOLS = {"true": "true", "false": "false"}
_ACCUMULATIONS = (
    "gradient_accumulation_steps",
    "grad_accumulation_steps",
    "grad_accum_steps",
    *FORMER_NAMES,
)
NO_FP4 = (
    "there is no fp4: `base_dtype` nf4 takes the same memory, and its levels fit weights better "
    "(arXiv 2305.14314)"
)
NO_OUTLIERS = (
    "int8 is one scale for each row of a weight; LLM.int8() of bitsandbytes also quantises "
    "activations, apart from outlier columns"
)
NO_GPTQ = (
    "weights in GPTQ or AWQ are not loaded: `base_dtype` nf4 quantises the unquantised model while "
    "it is read"
)
_NESTED = (
    "the blocks' scales are quantised too, which transformers and TRL leave off by default: "
    "`nf4_double_quant`=false switches it off"
)
_OF_BASE = {"true": "nf4", "false": "auto"}
_SPLIT = "`batch_size` is the effective batch size: it is split into these passes, not multiplied"
_ALIASES: dict[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "base_model", "model_name", "model_id", "model_path"),
    "data": ("dataset", "dataset_path", "train_file", "train_data", "data_path", "dataset_name"),
    "eval_data": ("validation_file", "eval_file", "eval_dataset", "validation_data"),
    "max_length": (
        *("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length"),
    ),
    "eval_fraction": ("val_size", "val_set_size"),
    "special_tokens": ("new_special_tokens",),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "exclude": ("exclude_modules",),
    "modules_to_save": ("lora_modules_to_save", "additional_target"),
    "layers": ("layers_to_transform", "peft_layers_to_transform"),
    "epochs": ("num_train_epochs", "num_epochs"),
    "steps": ("max_steps", "iters"),
    "learning_rate": ("lr",),
    "warmup_fraction": ("warmup_ratio",),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "min_rate_fraction": ("cosine_min_lr_ratio", "min_lr_ratio", "min_lr_rate"),
    "max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad_norm"),
    "eval_every_steps": ("eval_steps", "steps_per_eval"),
    "save_every_steps": ("save_steps", "save_every"),
    "keep_checkpoints": ("save_total_limit",),
    "patience": ("early_stopping_patience",),
    "name": ("run_name",),
    "devices": ("num_processes", "nproc_per_node", "num_gpus", "n_gpus", "num_devices"),
    "max_new_tokens": ("max_tokens", "max_gen_toks"),
    "temperature": ("temp",),
}
"""By setting of ours: the same setting with the same values elsewhere."""
_RESPELT: dict[str, PeerSetting] = {
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "target_modules"),
        PeerSetting("targets", {"all": "all-linear"}),
    ),
    "lora_target_linear": PeerSetting("targets", {"true": "all-linear"}),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "resume_adapter_file"),
        PeerSetting("from_adapter", beside="adapter"),
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt"),
        PeerSetting("learn_on", {"true": "all", "false": "assistant"}),
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "mask_prompt"),
        PeerSetting("learn_on", {"true": "assistant", "false": "all"}),
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "grad_checkpoint"),
        PeerSetting("memory", {"true": "full", "false": "none", "unsloth": "full+offload"}),
    ),
    "disable_gradient_checkpointing": PeerSetting("memory", {"true": "none", "false": "full"}),
    "bf16": PeerSetting("precision", {"true": "bf16", "false": "fp32"}),
    "load_best_model_at_end": PeerSetting("save", {"true": "best", "false": "last"}),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), PeerSetting("rslora", _BOOLS)),
    **dict.fromkeys(("sample_packing", "pack_sequences"), PeerSetting("packing", _BOOLS)),
    **dict.fromkeys(_ACCUMULATIONS[:3], PeerSetting("gradient_accumulation", note=_SPLIT)),
}
_QUANTISED: dict[str, PeerSetting] = {
    **dict.fromkeys(
        ("load_in_4bit", "use_4bit"),
        PeerSetting(
            "base_dtype",
            _OF_BASE,
            note=_NESTED,
            note_about="nf4_double_quant",
            gives_way="auto",
        ),
    ),
    **dict.fromkeys(
        ("qlora", "use_qlora", "quantize_base"),
        PeerSetting("base_dtype", _OF_BASE, gives_way="auto"),
    ),
    "load_in_8bit": PeerSetting(
        "base_dtype", {"true": "int8", "false": "auto"}, note=NO_OUTLIERS, gives_way="auto"
    ),
    "load_in_fp8": PeerSetting("base_dtype", {"true": "fp8", "false": "auto"}, gives_way="auto"),
    "load_in_16bit": PeerSetting("base_dtype", {"true": "auto", "false": "auto"}, gives_way="auto"),
    "quantization_bit": PeerSetting(
        "base_dtype",
        {"4": "nf4", "8": "int8", "none": "auto", "null": "auto"},
        refused={"*": "`base_dtype` has 4 bits (nf4) and 8 (int8, fp8)"},
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "quantization_type"),
        PeerSetting("base_dtype", {"nf4": "nf4"}, refused={"fp4": NO_FP4}, gives_way="nf4"),
    ),
    **dict.fromkeys(
        (
            *("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"),
            "use_nested_quant",
        ),
        PeerSetting("nf4_double_quant", _BOOLS),
    ),
    "bnb_4bit_compute_dtype": PeerSetting(
        "precision",
        {
            **dict.fromkeys(("bfloat16", "torch.bfloat16", "bf16"), "bf16"),
            **dict.fromkeys(("float32", "torch.float32", "fp32"), "fp32"),
            "auto": "auto",
        },
        refused={"*": "`precision` is bf16 or fp32: there is no fp16 training"},
    ),
}
_TWO_PATHS = "`out` is the directory for all runs and `name` that of this one"
_ADAMW = "the optimizer is AdamW with betas 0.9 and 0.99"
_REFUSED: dict[str, PeerSetting] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_batch_size", "micro_batch_size"),
        PeerSetting(
            because="`batch_size` is the effective batch size, over all passes of a step",
            instead=_effective_batch,
        ),
    ),
    "per_device_eval_batch_size": PeerSetting(
        because="evaluation takes the sequences of one pass of a training step; leave it out"
    ),
    "warmup_steps": PeerSetting(
        because="`warmup_fraction` is the fraction of the steps", instead=_warmup_fraction
    ),
    **dict.fromkeys(
        ("output_dir", "save_path"),
        PeerSetting(because=_TWO_PATHS, instead=_directory_and_name),
    ),
    "adapter_path": PeerSetting(because=_TWO_PATHS, instead=_directory_and_name, beside="adapter"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
        PeerSetting(
            because="`resume` continues the run called `name` from its newest checkpoint",
            instead=_resumed,
        ),
    ),
    "report_to": PeerSetting(
        because="TensorBoard is the only tracker; `report` is the HTML page of the run",
        instead=_trackers,
    ),
    **dict.fromkeys(
        ("wandb_project", "wandb_name", "use_wandb", "use_swanlab", "mlflow_tracking_uri"),
        PeerSetting(
            because="TensorBoard is the only tracker",
            instead=lambda value, others: {"tensorboard": "true"},
        ),
    ),
    "logging_steps": PeerSetting(because="every step is in metrics.jsonl; leave it out"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "save_strategy"),
        PeerSetting(because="`eval_every_steps` and `save_every_steps` say when"),
    ),
    "bnb_4bit_quant_storage": PeerSetting(
        because="the codes of `base_dtype` nf4 are uint8 tensors, sharded or not; leave it out"
    ),
    **dict.fromkeys(
        ("quantization_config", "bnb_config_kwargs"),
        PeerSetting(
            because="`base_dtype` nf4 is BitsAndBytesConfig's nf4, and `nf4_double_quant` its "
            "bnb_4bit_use_double_quant",
            instead=lambda value, others: {"base_dtype": "nf4"},
        ),
    ),
    "quantization_method": PeerSetting(
        because="`base_dtype` nf4 is bitsandbytes' nf4, value by value; there is no HQQ or EETQ. "
        "Leave it out"
    ),
    **dict.fromkeys(
        ("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_has_fp16_weight"),
        PeerSetting(because=f"`base_dtype` {NO_OUTLIERS}"),
    ),
    **dict.fromkeys(
        ("gptq", "awq"),
        PeerSetting(
            because=NO_GPTQ,
            instead=lambda value, others: {} if value == "false" else {"base_dtype": "nf4"},
        ),
    ),
    "fp16": PeerSetting(
        because="there is no fp16 training, which needs loss scaling",
        instead=lambda value, others: {} if value == "false" else {"precision": "bf16"},
    ),
    **dict.fromkeys(
        ("torch_dtype", "dtype"),
        PeerSetting(because="`precision` is the compute dtype, `base_dtype` that of the weights"),
    ),
    **dict.fromkeys(("optim", "optimizer"), PeerSetting(because=f"{_ADAMW}; leave it out")),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        PeerSetting(because=f"{_ADAMW}, which cannot be changed"),
    ),
    "finetuning_type": PeerSetting(
        because="LoRA is what trains; `full` trains all weights", instead=_whole_model
    ),
    **dict.fromkeys(("use_dora", "peft_use_dora"), PeerSetting(because="there is no DoRA here")),
    "neftune_noise_alpha": PeerSetting(because="there is no NEFTune here"),
    "num_layers": PeerSetting(
        because="`layers` lists the transformer blocks to adapt, such as 0,1"
    ),
    "add_special_tokens": PeerSetting(because="`special_tokens` lists the tokens to add"),
    "data_seed": PeerSetting(because="`seed` is that of the data order too"),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "fsdp_version", "deepspeed", "use_fsdp"),
        PeerSetting(
            because="`parallel` fsdp shards the weights, by PyTorch's FSDP2 or a step of our own",
            instead=lambda value, others: {} if value == "false" else {"parallel": "fsdp"},
        ),
    ),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_backend", "ddp_bucket_cap_mb"),
        PeerSetting(because="`parallel` ddp sums gradients without torch's DDP; leave it out"),
    ),
    "ddp_timeout": PeerSetting(
        because="processes wait for each other for at most 1800 s; the environment variable "
        "LORALM_MAX_WAIT_S changes that"
    ),
    "device_map": PeerSetting(because="`device` is the one device of a run"),
    "max_samples": PeerSetting(because="all examples are used; name a file with fewer"),
    "datasets": PeerSetting(because="`data` is one file or directory"),
    "do_sample": PeerSetting(
        because="a `temperature` above 0 samples, 0 is greedy",
        instead=lambda value, others: {"temperature": "0" if value == "false" else "0.7"},
    ),
}
PEER_SETTINGS: dict[str, PeerSetting] = {
    **{name: PeerSetting(ours) for ours, names in _ALIASES.items() for name in names},
    **{name: PeerSetting(ours) for name, ours in FORMER_NAMES.items()},
    **_RESPELT,
    **_QUANTISED,
    **_REFUSED,
}
"""By name with underscores: the settings of other tools and older versions that are known."""


def find_peer(name: str) -> PeerSetting | None:
    """Return what the setting `name` of another tool is here; None if it is not known."""
    return PEER_SETTINGS.get(name.lower().replace("-", "_"))
