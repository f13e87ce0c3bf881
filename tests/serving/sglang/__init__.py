"""SGLang on a CPU, with expert parallelism and with its own EPLB."""
