"""What Python users and notebooks see: a run as an object.

    import autoquant_ray

    run = autoquant_ray.search(model="./Qwen3-4B", data="text.jsonl", out="runs/qwen3", bits=5)
    run.sensitivity.to_pandas()
    run.solve(bits=4.5)
    run.explain("lm_head", solution="bits-4.50")
    run.evaluate(samples=64)

``docs/python-api.md`` has a session and all names. Importing this module imports neither torch nor
Ray; ``search``, ``evaluate`` and ``refine`` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.explanation import Explanation
from autoquant_ray.allocate.frontier import Frontier, frontier_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.calibrate.modelopt_config import config_of_solution
from autoquant_ray.compare.runs import compare_runs
from autoquant_ray.compare.verdict import Comparison
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ConfigError
from autoquant_ray.imports.modelopt import import_manifest
from autoquant_ray.imports.tool_allocations import import_allocation
from autoquant_ray.notebook import facts_html
from autoquant_ray.report.content import collect_content
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    MANIFEST_JSON,
    PLAN_FILE,
    SENSITIVITY_FILE,
    SOLUTIONS,
    solution_folder,
)
from autoquant_ray.runs.state import Mode, RunState
from autoquant_ray.solve import Solution, rewrite_reports, solve_run, solve_within

if TYPE_CHECKING:
    from autoquant_ray.evaluate.evaluate import Evaluation
    from autoquant_ray.evaluate.refine import Refinement
    from autoquant_ray.export.checkpoint import Checkpoint


class Run:
    """A finished scan.

    Args:
        directory: Its run directory; :meth:`open` takes a path.

    Raises:
        StoreError: It is not a run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        RunState.open(directory)

    @classmethod
    def open(cls, path: str) -> Run:
        """Open a run directory: local path, ``s3://`` or ``gs://``.

        Raises:
            StoreError: It is not a run.
        """
        return cls(RunDirectory(path))

    @classmethod
    def import_manifest(cls, manifest: str, out: str, *, overwrite: bool = False) -> Run:
        """Turn a ModelOpt AutoQuant JSON manifest into a run.

        Args:
            manifest: The JSON file.
            out: Run directory to write.
            overwrite: Delete the run in ``out`` first.

        Raises:
            DataError: It is not such a manifest.
            StoreError: ``out`` holds a run.
        """
        import_manifest(manifest, RunDirectory(out), overwrite=overwrite)
        return cls.open(out)

    @property
    def path(self) -> str:
        """Where it is."""
        return self._directory.uri

    @property
    def sensitivity(self) -> pa.Table:
        """Scores of every group and format, ``score`` in nats per token; ``to_pandas()`` it."""
        return self._directory.read_table(SENSITIVITY_FILE)

    @property
    def plan(self) -> pa.Table:
        """Groups x formats x costs."""
        return self._directory.read_table(PLAN_FILE)

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """Shards that were left out, each with its stage and the reason.

        Where there are any, the scores lack a part of the data; the commands exit with 3.
        """
        return [{**entry} for entry in RunState.open(self._directory).record.quarantined]

    @property
    def solutions(self) -> list[str]:
        """Names of the solutions beside the scan's own, whose name is ''."""
        return self._directory.list_folders(SOLUTIONS)

    def manifest(self, solution: str = "") -> dict[str, Any]:
        """Content of a solution's ``manifest.json``.

        Raises:
            StoreError: There is no such solution.
        """
        manifest: dict[str, Any] = self._directory.read_json(
            f"{self._start(solution)}{MANIFEST_JSON}"
        )
        return manifest

    def quantization_config(
        self, solution: str = "", *, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> dict[str, Any]:
        """What ``mtq.quantize`` takes to quantize the model as a solution says.

        ``device`` is where the model is, see
        :func:`~autoquant_ray.calibrate.modelopt_config.load_quantization_config`. Fitted weights
        are taken from the run.
        """
        return config_of_solution(self._directory, solution, device=device)

    def solve(self, *, bytes: int | str | None = None, **options: Any) -> Solution:
        """Solve another budget.

        Args:
            bytes: Of the whole model, such as ``"2.5GiB"``.
            options: Fields of :class:`~autoquant_ray.allocate.options.SolveOptions`: ``bits``,
                ``pins`` (group -> format), ``allow`` (pattern -> list of formats),
                ``max_formats``, ``kv_bytes_per_token``, ``latency``
                (:func:`autoquant_ray.latency_of`), ``engine``, ``gpu``, ...

        Raises:
            ConfigError: An unknown or a wrong option.
            InfeasibleBudgetError: With the reachable range.
        """
        return solve_run(self._directory, SolveOptions(bytes=bytes, **options))

    def import_allocation(self, file: str, name: str | None = None) -> Solution:
        """Make a solution of what AutoRound or mlx-lm chose.

        Args:
            file: AutoRound's ``layer_config``, or mlx-lm's quantization or sensitivities.
            name: Of the solution; default: the file's.

        Raises:
            DataError: It is no such file, or does not fit the run.
        """
        return import_allocation(file, self._directory, name)

    def solve_within(self, largest_kl: float) -> Solution:
        """Solve the fewest bits that are predicted to lose at most so many nats per token."""
        return solve_within(self._directory, largest_kl)

    def frontier(self, num_points: int = 64) -> Frontier:
        """Predicted loss at every size, the knee among the points; all are written to the run.

        Raises:
            ConfigError: Fewer than two points.
        """
        return Frontier(frontier_of(self._directory, num_points))

    def explain(self, group: str, solution: str = "") -> Explanation:
        """Why a group got its format, and what another one would cost.

        Args:
            group: Name of a group or of one of its layers, or a part that fits no other group.
            solution: One of :attr:`solutions`; '' for the scan's own.

        Raises:
            ConfigError: No group, or more than one, fits.
            StoreError: There is no such solution.
        """
        return explain_group(self._directory, group, solution)

    def compare(self, before: Run | str) -> Comparison:
        """What changed since an earlier run, and whether that is more than noise.

        Args:
            before: The earlier run, or its path.
        """
        path = before if isinstance(before, str) else before.path
        return compare_runs(RunDirectory(path), self._directory)

    def report(self) -> list[str]:
        """Write the reports of the run and of its solutions again; returns their paths."""
        return rewrite_reports(self._directory)

    def evaluate(self, **fields: Any) -> Evaluation:
        """Measure a solution on data that the scan has not seen.

        Args:
            fields: Of :class:`~autoquant_ray.config.evaluation.EvaluationConfig`.
        """
        from autoquant_ray.evaluate.evaluate import evaluate_run

        return evaluate_run(self._evaluation_config(fields))

    def refine(self, num_trials: int = 200, *, seed: int = 0, **fields: Any) -> Refinement:
        """Search around a solution by measured KL; fields as in :meth:`evaluate`."""
        from autoquant_ray.evaluate.refine import refine_run

        return refine_run(self._evaluation_config(fields), num_trials, seed)

    def export(
        self,
        out: str,
        solution: str = "",
        *,
        format: str | None = None,
        engine: str | None = None,
        gpu: str | None = None,
        max_shard_size: str = "50GB",
        extra_heads: str | None = None,
    ) -> Checkpoint:
        """Write a solution as a checkpoint that engines load, a decoder layer in memory at a time.

        Args:
            out: Folder to write; new or empty.
            solution: One of :attr:`solutions`; '' for the scan's own.
            format: ``modelopt`` or ``compressed-tensors``; None: the one in which the engine, or
                that of the solution, serves it; without an engine ``modelopt``.
            engine: Refuse what this engine cannot serve: ``vllm``, ``sglang`` or ``trtllm``.
            gpu: On this generation or card.
            max_shard_size: Largest size of a file of weights, such as ``5GB`` or ``500MB``.
            extra_heads: Format of the linears of heads that transformers does not load; None: 16
                bits.

        Raises:
            FormatError: The layout cannot hold the solution.
            ConfigError: The engine cannot serve it, or ``out`` is not empty.
            CheckpointError: What was written is not what the manifest says; it is deleted.
        """
        from autoquant_ray.export.checkpoint import export_run

        return export_run(
            self._directory,
            out,
            solution=solution,
            layout=format,
            engine=engine,
            gpu=gpu,
            max_shard_size=max_shard_size,
            extra_heads=extra_heads,
        )

    def _repr_html_(self) -> str:
        state = RunState.open(self._directory)
        if not self._directory.exists(MANIFEST_JSON):
            stages = ", ".join(f"{name} {e['state']}" for name, e in state.record.stages.items())
            facts = [("Model", state.record.model["name"]), ("Stages", stages or "none yet")]
            return facts_html(f"Unfinished run {self.path}", facts)
        content = collect_content(ScoredRun.read(state), "")
        return facts_html(content.title, content.facts)

    def __repr__(self) -> str:
        return f"Run.open({self.path!r})"

    def _evaluation_config(self, fields: dict[str, Any]) -> EvaluationConfig:
        return validate(EvaluationConfig, fields | {"run": self.path})

    @staticmethod
    def _start(solution: str) -> str:
        return solution_folder(solution)


def search(config: ScanConfig | None = None, *, mode: Mode = "new", **fields: Any) -> Run:
    """Scan a model; the Python form of ``autoquant-ray scan``.

    Args:
        config: What to do; or its fields as keywords.
        mode: ``new``, ``resume`` or ``overwrite``.
        fields: Fields of :class:`~autoquant_ray.config.scan.ScanConfig`.

    Raises:
        AutoQuantError: One of its subclasses; the run directory stays resumable.
    """
    from autoquant_ray.scan import run_search

    if (config is None) == (not fields):
        raise ConfigError("give a ScanConfig or its fields, one of both")
    chosen = config or validate(ScanConfig, fields)
    run_search(chosen, mode)
    return Run.open(chosen.out)
