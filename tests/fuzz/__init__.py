"""Inputs drawn by hypothesis for whatever meets the outside: one answer that keeps its contract, or one of our errors.

    targets.py     the targets by name: what is drawn, and what must hold
    readers.py     files of records           config.py    settings of any value
    maths.py       cost-to-go, merged shards  servers.py   any bytes as a server's answer

A few hundred cases each in every test run, the same ones (`test_fuzz.py`); as many as one likes by
`python -m tests.fuzz --cases 100000`, others each time; guided by coverage, where atheris is installed, by `guided.py`.
"""
