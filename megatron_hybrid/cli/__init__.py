"""The command line: `--hybrid-*` flags out of the config classes, and a program that trains with them.

arguments.py   add_hybrid_args(parser) declares them, hybrid_config_from_args(args) reads the method back
program.py     how such a program starts and ends; heavy imports only inside functions
train.py       megatron-hybrid-train: a whole online run
"""
