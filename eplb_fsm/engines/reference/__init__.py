"""The reference engine: a small real MoE language model that decodes with expert parallelism over gloo."""
