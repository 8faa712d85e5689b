"""The multiple-choice knapsack on arrays, solved exactly; knows no names of groups or formats.

Imports only the top level. No torch, no Ray. HiGHS loses small scores to its tolerances: a single
budget is solved by our own algorithm, and only several at once by HiGHS
(:mod:`~autoquant_ray.allocate.knapsack.several`).
"""
