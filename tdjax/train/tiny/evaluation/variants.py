"""The rows of the recipe's table: which weights, sampled how, beside what."""

from __future__ import annotations

import dataclasses

from tdjax.config import SamplerConfig
from tdjax.train.tiny.data import captions
from tdjax.train.tiny.evaluation import sampling
from tdjax.train.tiny.settings import EvaluateStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table: the folder of a transformer ("" for clips that no transformer makes) and
    what is done with it."""

    key: str  # of the file of its results
    title: str
    weights: str = ""
    sampler: SamplerConfig | None = None
    linear: str = "float"
    parent: str = ""  # key of the row whose clips it should reproduce
    split: str = "train"
    template: str | None = None

    @property
    def evaluations(self) -> int:
        """How often a clip calls the network: twice a step under guidance."""
        if self.sampler is None:
            return 0
        return self.sampler.num_steps * (1 if self.sampler.guidance_scale == 1 else 2)


def variants(cfg: EvaluateStage) -> tuple[Variant, ...]:
    """Returns all rows in the order of the table."""
    guided = lambda steps, mode: sampling.teacher(steps, mode, cfg.guidance, cfg.shift)
    few = sampling.student
    v = lambda key, title, weights="", sampler=None, **more: Variant(
        key=key, title=title, weights=weights, sampler=sampler, **more
    )
    unipc = guided(50, "unipc")
    packaged = "student + SLA, INT8 (packaged)"
    int8 = {"linear": "int8"}
    new = {"template": captions.EVALUATION}
    unseen = {"split": "held_out"}
    return (
        v("truth", "ground truth"),
        v("vae", "VAE round trip", parent="truth"),
        v("teacher_unipc_50", "teacher, UniPC", "teacher", unipc),
        v("teacher_euler_50", "teacher, Euler", "teacher", guided(50, "euler")),
        v("teacher_euler_4", "teacher, Euler", "teacher", guided(4, "euler")),
        v("teacher_unipc_4", "teacher, UniPC", "teacher", guided(4, "unipc")),
        v("undistilled_4", "teacher's weights as student", "teacher", few(4)),
        v("sla_50", "SLA teacher, UniPC", "sla", unipc, parent="teacher_unipc_50"),
        v("student_4", "student", "student", few(4)),
        v("student_2", "student", "student", few(2)),
        v("student_1", "student", "student", few(1)),
        v("student_4_ode", "student, ODE", "student", few(4, "ode")),
        v("scm_4", "consistency alone", "student_scm", few(4)),
        v("scm_1", "consistency alone", "student_scm", few(1)),
        v("dmd_4", "distribution matching alone", "student_dmd", few(4)),
        v("dmd_1", "distribution matching alone", "student_dmd", few(1)),
        v("merged_raw_4", "student + SLA, merged", "merged_raw", few(4), parent="student_4"),
        v("merged_4", "student + SLA, merged and healed", "merged", few(4), parent="student_4"),
        v("merged_2", "student + SLA, merged and healed", "merged", few(2), parent="student_2"),
        v("merged_1", "student + SLA, merged and healed", "merged", few(1), parent="student_1"),
        v("student_int8_4", "student, INT8", "student", few(4), parent="student_4", **int8),
        v("merged_int8_4", packaged, "merged", few(4), parent="merged_4", **int8),
        v("merged_int8_1", packaged, "merged", few(1), parent="merged_1", **int8),
        v("teacher_new", "teacher, UniPC, unseen wording", "teacher", unipc, **new),
        v("student_new", "student, unseen wording", "student", few(4), **new),
        v("teacher_unseen", "teacher, UniPC, unseen shape and colour", "teacher", unipc, **unseen),
        v("student_unseen", "student, unseen shape and colour", "student", few(4), **unseen),
    )
