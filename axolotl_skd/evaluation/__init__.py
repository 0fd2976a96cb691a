"""Evaluation: answer extraction, grading, ROUGE, COMET, and the runner of the bundled lm-eval tasks.

Importing any of it takes no axolotl, trl, torch or transformers, so that an lm-eval environment of
its own can use it. Models live in child processes; COMET's estimator alone runs in this one, and
imports torch when it is asked to score.
"""
