"""What is made ready for the stages before they run: kernels checked, programs compiled by threads,
weights read ahead in the order of the stages."""

from __future__ import annotations

from tdjax.pipeline.compilation import Program, Programs
from tdjax.pipeline.components import Component
from tdjax.pipeline.denoising import Denoising
from tdjax.pipeline.kernel_check import check_kernels
from tdjax.pipeline.memory import ExecutionPlan
from tdjax.pipeline.preview import Previews
from tdjax.pipeline.request import ModelInfo, Request
from tdjax.pipeline.text_encoding import TextEncoding
from tdjax.pipeline.vae_coding import ImageEncoding, VAECoding
from tdjax.text.prompt_cache import PromptCache
from tdjax.text.tokenizer import Tokenizer


class Preparation:
    """The stages of a pipeline, made, and seen from before they run."""

    def __init__(
        self,
        programs: Programs,
        components: dict[str, Component],
        tokenizer: Tokenizer | None,
        prompt_cache: PromptCache | None,
        info: ModelInfo,
    ):
        self.programs, self.components, self.stages = programs, components, programs.stages
        dtype = components["dit"].config.policy.compute_dtype
        self.text_encoding = TextEncoding(
            programs,
            components.get("text"),
            tokenizer,
            prompt_cache,
            self.stages,
            dtype,
            info.language,
        )
        self.vae_coding = VAECoding(programs, components["vae"], self.stages)
        self.image_encoding = ImageEncoding(self.vae_coding)
        previews = Previews(self.vae_coding)
        self.denoising = Denoising(programs, components, info.text_len, self.stages, previews)
        self._kernels_checked = False
        self._begun: set[tuple] = set()

    def check_kernels(self) -> None:
        """Tries the kernels that the transformer will run, once for a pipeline. Raises
        KernelError."""
        if not self._kernels_checked:
            check_kernels(self.components["dit"].config, self.stages)
            self._kernels_checked = True

    def begin(self, request: Request, plan: ExecutionPlan) -> None:
        """Where everything fits together: threads compile the programs of all stages, and load
        weights in the order of stages, while the first stage runs. Elsewhere each stage makes its
        program, which takes memory too, and then loads."""
        if not plan.keep_resident:
            return
        single = self.stages.show or request.single_steps
        how = single, request.on_preview is not None, self.programs.dropped
        shapes = request.size, request.sampler, request.output_type, *how
        if shapes not in self._begun:
            self._begun.add(shapes)
            with self.stages("prepare"):
                for program in self._later_programs(request, plan):
                    program.begin()
        for name in self._order(request, plan):
            self.components[name].load_ahead()

    def compile(self, request: Request, plan: ExecutionPlan, singles: tuple[bool, ...]) -> None:
        """Compiles every stage of a request; no weights are loaded. singles: whether the denoising
        loop is one call (False), or a call for each step (True)."""
        programs = self.text_encoding.programs(request, plan)
        for single in singles:
            programs += self._later_programs(request, plan, single)
        for program in programs:
            program.begin()
        for program in programs:
            program.wait()

    def _later_programs(
        self, request: Request, plan: ExecutionPlan, single: bool | None = None
    ) -> list[Program]:
        """Those of every stage after the text encoder."""
        return [
            *self.image_encoding.programs(request, plan),
            *self.denoising.programs(request, plan, single=single),
            *self.vae_coding.programs(request, plan),
        ]

    def _order(self, request: Request, plan: ExecutionPlan) -> list[str]:
        """The components after the text encoder as their stages come."""
        experts = dict.fromkeys(s.expert for s in self.denoising.segments(request, plan))
        if request.image is not None:
            return ["vae", *experts]
        return [*experts] if request.output_type == "latent" else [*experts, "vae"]
