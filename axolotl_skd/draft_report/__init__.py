"""How good a draft model the student is for its teacher, before and after distillation.

Appendix J of the SKD paper (https://arxiv.org/abs/2410.11325) for the user's own pair: speculative
decoding that preserves the teacher's distribution, measured with transformers' assisted generation.
`axolotl skd speedup CONFIG` is its command line.
"""
