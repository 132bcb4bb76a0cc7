"""Speculative decoding: drafts of several tokens, which one forward of the target verifies.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023; trees of drafts after
Miao et al., "SpecInfer", ASPLOS 2024. Verification is sample-and-match over noise keyed by position (Daliri, Musco,
Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024): the target's own token is
drawn at every place, and a draft counts only where it is that token. So output never depends on drafts.
"""
