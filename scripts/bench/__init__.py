"""The benchmark: our stages against TRL's trainers and against plain torch loops, on the same rows, weights and steps.

flops.py      the work that cannot be avoided, and what the device's matrix products reach
measure.py    steps in turns, with clocks, memory, and how much of the machine others took
material.py   tokenizers and models made on the spot, kept in the work folder
cases.py      what is measured: a case is a stage with a model and a batch
ours.py       our real stage; peer.py, peer_ppo.py: TRL's trainers; raw_*.py: plain torch, as fast as it gets
worker.py     one case in its own process
page.py       docs/performance.md
"""
