"""The exact multiple-choice knapsack on arrays; knows no names of groups or formats.

Imports only the top level. :mod:`~autoquant_ray.allocate.knapsack.knapsack` describes the method.
"""
