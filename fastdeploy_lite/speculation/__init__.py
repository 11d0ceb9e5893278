"""Speculative decoding: guess the next tokens cheaply, let the model check them all in one step.

`drafters` guess from what was read and written, `rates` knows how good the guesses are and what a
step costs, `speculator` decides with both how many tokens of which sequence are worth checking.
The check is exact: each position is sampled as it would have been without speculation, and a draft
token counts only if it equals what was sampled. So answers do not change, greedy or not.
"""
