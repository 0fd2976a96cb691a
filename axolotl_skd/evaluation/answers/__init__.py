"""When two written answers are the same: text, units, numbers, structure, and math-verify on top.

Pure functions over short texts. They are not hardened against hostile input by themselves: call
`axolotl_skd.evaluation.grading.grade`, which screens its input and runs them in a process that can
be killed.
"""
