"""Model folders whose weights are quantised: 4-bit ones of bitsandbytes read and written."""
