"""The scoring core, and the scorer that a worker runs.

Imports ``score.rerun``, ``calibrate``, ``quantize``, ``plan``, ``models`` and below, and torch. No
Ray.

Gradient checkpointing that stops its recomputation early skips modules, and with them their hooks;
:mod:`~autoquant_ray.score.backward` visits layers by hand instead. The parameters of an offloaded
layer are on the meta device outside a visit (:mod:`~autoquant_ray.score.residence`): read a weight
when it is used, since a reference taken before is stale and one kept leaks a layer. Some
vision-language models add the tower's output between decoder layers (DeepStack), which
:mod:`~autoquant_ray.score.entrance` notes; it must be added wherever a layer runs. The first step
with images runs the tower twice, for a check, before anything watches. Some models keep state
between runs (``dynamic`` rope), which :mod:`~autoquant_ray.score.rerun.forward_state` undoes where
:class:`~autoquant_ray.score.backward.LayerwiseBackward` runs them: run them nowhere else.
"""
