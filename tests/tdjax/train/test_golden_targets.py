"""The losses of distillation against the official code's numbers
(tests/golden/train_targets.npz)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from einops import rearrange
from tolerances import assert_close

from convert.golden import Held
from tdjax.checkpoints.published.checkpoint import Checkpoint
from tdjax.checkpoints.published.detect import detect
from tdjax.checkpoints.published.files import Source
from tdjax.precision import FLOAT32
from tdjax.sampling import few_step, flow
from tdjax.train import consistency, distribution, methods, rcm
from tdjax.train.configs import EMAConfig, RCMConfig
from tdjax.train.ema import ema_beta, exponent

SIZE = 4 * 2 * 4 * 6
KAPPA, FLOOR = 100 / SIZE**0.5, 0.1 / SIZE**0.5  # loss_scale 100 and c = 0.1 at this size
OURS = {  # five of the official weights, and where they are in ours
    "patch_embedding.weight": lambda m: m.patch_embed.kernel[...].T,
    "blocks.0.self_attn.q.weight": lambda m: m.blocks.self_attn.q.kernel[0].T,
    "blocks.1.modulation": lambda m: m.blocks.modulation[1][None],
    "head.head.weight": lambda m: m.head.proj.kernel[...].T,
    "time_embedding.0.weight": lambda m: m.time_embed.up.kernel[...].T,
}


def video(x):
    return put(rearrange(np.asarray(x, np.float32), "b c t h w -> b t h w c"))


def official(x):
    return rearrange(np.asarray(x), "b t h w c -> b c t h w")


network = jax.jit(
    lambda model, *args: model(*args)
)  # compiled once for all; the losses around it run op by op


class Case:
    """The three networks as velocities, the inputs, and coefficients of TrigFlow times."""

    def __init__(self, g):
        self.g = g
        self.student, self.teacher, self.fake = (
            self.load(name) for name in ("student", "teacher", "fake")
        )
        self.text = put(g["in/cond"])

    def load(self, name):
        held = {key: Held(value) for key, value in self.g.weights(f"w/{name}/").items()}
        found = detect(
            held, name, policy=FLOAT32, round_time=False, heads=self.g.config["num_heads"]
        )
        return Checkpoint(Source(Path(name), (), held, {}), found, held).load()

    def velocity(self, model):
        return lambda x, timestep: network(model, x, timestep, self.text)

    def guided(self):
        # The golden negative is one embedding for each sample; ours is one for all.
        uncond = put(self.g["in/uncond"])
        return few_step.guided(
            self.velocity(self.teacher),
            lambda x, timestep: network(self.teacher, x, timestep, uncond),
            5.0,
        )


@pytest.fixture(scope="module")
def case(golden):
    return Case(golden("train_targets"))


def at_time(t):
    """Coefficients of a TrigFlow time, each rounded once: 1000 u must be the official float32, as
    the networks are steep in it."""
    t = np.asarray(t, np.float64).reshape(-1)
    sin, cos = np.sin(t), np.cos(t)
    exact = {
        "u": sin / (sin + cos),
        "a": cos / (sin + cos),
        "b": 1 / (sin + cos),
        "sin": sin,
        "cos": cos,
    }
    return flow.Coefficients(**{name: put(value, jnp.float32) for name, value in exact.items()})


def log_sigma(t):
    return put(np.log(np.tan(np.asarray(t, np.float64))).reshape(-1), jnp.float32)


def assert_gradients(grads, g, prefix):
    """In units of the largest entry."""
    for name, ours in OURS.items():
        expected = g[f"{prefix}/grad_of_loss_sum/{name}"]
        largest = np.abs(expected).max()
        assert_close(ours(grads) / largest, expected / largest, "train_targets", f"{prefix} {name}")


def test_scaling_and_times(golden):
    g = golden("train_targets")
    t = g["in/scaling/t_trig"]
    c = flow.from_log_sigma(log_sigma(t))
    for name, value in {
        "c_skip": c.b,
        "c_in": c.b,
        "c_out": -c.u,
        "c_noise": flow.TIME_SCALE * c.u,
    }.items():
        assert_close(value, g[f"out/scaling/{name}"], "sampler", name)
    rf = g["in/time/rf"].astype(np.float32)
    c = flow.from_u(put(rf))
    assert_close(np.arctan2(c.sin, c.cos), g["out/time/rf_to_trig"], "sampler")
    assert_close(1 / (1 + flow.sigma(rf[:-1])), 1 / (1 + g["out/time/rf_to_sigma"][:-1]), "sampler")
    assert_close(flow.u_from_trig(t), g["out/time/trig_to_rf"], "sampler")
    assert_close(flow.shift(rf, 5.0), g["out/time/shift5"], "sampler")


@pytest.mark.slow
def test_denoiser(case):
    g, c = case.g, at_time(case.g["in/time_trig"])
    p = flow.per_sample(c)
    x = p.b * video(g["in/denoise/xt"])
    v = consistency.at(case.velocity(case.teacher), x, c.u)
    assert_close(official(flow.data(x, v, p)), g["out/denoise/teacher_x0"], "train_targets")
    assert_close(
        official(flow.trig_from_velocity(x, v, p)), g["out/denoise/teacher_F"], "train_targets"
    )


def consistency_terms(case, tangent, r, interval=0.01):
    """Everything between the data and the loss, at the golden times; the file was made with the
    official code of 2026."""
    c = at_time(case.g["in/time_trig"])
    p = flow.per_sample(c)
    x = flow.noisy(video(case.g["in/x0"]), video(case.g["in/eps"]), p)
    v_teacher = consistency.at(case.guided(), x, c.u)
    v, term = consistency.TANGENT[tangent](case.velocity(case.student), x, v_teacher, c, interval)
    g = consistency.raw_direction(x, v_teacher - v, term, c, r, "code2026")
    direction = consistency.normalised(g, FLOOR)
    loss = lambda student: consistency.consistency_loss(
        case.velocity(student), x, c, direction, KAPPA
    )[0]
    return (
        x,
        c,
        {
            "v": v,
            "v_teacher": v_teacher,
            "dF": p.cos * p.sin * (term - x / p.b),
            "g": g,
            "direction": direction,
            "loss": loss,
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, r", [("scm_warm0.3", 0.3), ("scm_warm1", 1.0)])
def test_consistency(case, name, r):
    g = case.g
    x, c, got = consistency_terms(case, "exact", r)
    p = flow.per_sample(c)
    out = lambda key: g[f"out/{name}/{key}"]
    assert_close(official(x / p.b), out("xt"), "train_targets")
    f_teacher = flow.trig_from_velocity(x, got["v_teacher"], p)
    assert_close(official(f_teacher), out("F_teacher_cfg"), "train_targets")
    assert_close(official(p.cos * p.sin * f_teacher), out("tangent_x"), "train_targets")
    assert_close((c.cos * c.sin)[:, None], out("tangent_t"), "train_targets")
    for key in ("F_theta", "F_theta_jvp_primal"):
        assert_close(official(flow.trig_from_velocity(x, got["v"], p)), out(key), "train_targets")
    assert_close(official(flow.data(x, got["v"], p)), out("x0_theta"), "train_targets")
    for key, value in {"tangent_F_theta": "dF", "g_raw": "g", "g_normalised": "direction"}.items():
        assert_close(official(got[value]), out(key), "train_targets", key)
    assert_close(got["loss"](case.student), out("loss_per_sample"), "train_targets")
    assert_gradients(
        jax.grad(lambda student: got["loss"](student).sum())(case.student), g, f"out/{name}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tangent", [("scm_fd1_h0.01", "semidiscrete"), ("scm_fd2_h0.01", "discrete")]
)
def test_finite_differences(case, name, tangent):
    g = case.g
    _, _, got = consistency_terms(case, tangent, 1.0)
    assert_close(official(got["dF"]), g[f"out/{name}/tangent_F_theta"], "train_targets_difference")
    assert_close(got["loss"](case.student), g[f"out/{name}/loss_per_sample"], "train_targets")


@pytest.mark.slow
def test_discrete_consistency(case):
    g = case.g
    times = consistency.dcm_times(put(g["in/dcm/u"][:, 0]), 48, 5.0, 1)
    for s, name in zip(times, ("t0", "tN"), strict=True):
        c = flow.from_log_sigma(s)
        assert_close(np.arctan2(c.sin, c.cos), g[f"out/dcm/{name}"][:, 0], "float32", name)
    c, after = (at_time(g[f"out/dcm/{name}"]) for name in ("t0", "tN"))
    x = flow.noisy(video(g["in/x0"]), video(g["in/eps"]), flow.per_sample(c))
    assert_close(official(x / flow.per_sample(c).b), g["out/dcm/xt"], "train_targets")
    there = consistency.teacher_steps(case.guided(), x, times)
    assert_close(official(there / flow.per_sample(after).b), g["out/dcm/x_next"], "train_targets")
    student = case.velocity(case.student)
    x0, target = distribution.data_of(student, x, c), distribution.data_of(student, there, after)
    loss = consistency.dcm_loss(student, x, c, target)
    assert_close(official(x0), g["out/dcm/x0_pred"], "train_targets")
    assert_close(official(target), g["out/dcm/x0_target"], "train_targets")
    assert_close(100.0 * loss, g["out/dcm/loss_per_sample"], "train_targets")


@pytest.mark.slow
def test_distribution_matching_and_critic(case):
    """Two simulated steps; the gradient goes through the second alone."""
    g = case.g
    noise = jnp.stack([video(g["in/dmd/init_noise"]), video(g["in/dmd/renoise"])], 1)
    s = jnp.stack([jnp.full(2, jnp.inf), log_sigma(g["in/dmd/t_mid"])], 1)
    eps, s_late = video(g["in/dmd/eps_D"]), log_sigma(g["in/dmd/t_D"])

    critic = case.velocity(case.fake)

    x, now = distribution.rollout(case.velocity(case.student), noise, s, 2)

    def loss(student):
        made = distribution.data_of(case.velocity(student), x, flow.from_log_sigma(now))
        d, gap = jax.lax.stop_gradient(
            distribution.dmd_direction(
                jax.lax.stop_gradient(made), case.guided(), critic, eps, s_late
            )
        )
        values = distribution.dmd_loss(made, d)
        return values.sum(), (made, d, gap, values)

    grads, (made, d, gap, values) = jax.grad(loss, has_aux=True)(case.student)
    assert_close(official(made), g["out/dmd/G_x0"], "train_targets")
    assert_close(gap, g["out/dmd/weight"].reshape(-1), "train_targets")
    assert_close(official(d), g["out/dmd/grad"], "train_targets")
    assert_close(values, g["out/dmd/loss_per_sample"], "train_targets")
    assert_gradients(grads, g, "out/dmd")

    c = flow.from_log_sigma(s_late)
    x = flow.noisy(made, eps, flow.per_sample(c))
    assert_close(official(x / flow.per_sample(c).b), g["out/dmd/D_xt"], "train_targets")
    assert_close(
        official(distribution.data_of(case.guided(), x, c)),
        g["out/dmd/x0_teacher_cfg"],
        "train_targets",
    )
    for prefix in ("dmd", "critic"):
        assert_close(
            official(distribution.data_of(critic, x, c)),
            g[f"out/{prefix}/x0_fake"],
            "train_targets",
        )
    loss = lambda fake: distribution.critic_loss(case.velocity(fake), made, eps, s_late)[0]
    assert_close(loss(case.fake), g["out/critic/loss_per_sample"], "train_targets")
    assert_gradients(jax.grad(lambda fake: loss(fake).sum())(case.fake), g, "out/critic")


def test_schedule(golden):
    g = golden("train_targets")
    own = g.config["schedule"]
    config = RCMConfig(frequency=own["student_update_freq"], warmup=own["tangent_warmup"])
    steps = g["in/schedule/iteration"]
    schedule = methods.rcm_schedule(config)
    turns = [schedule.phase(int(i)) == "student" for i in steps]
    assert turns == g["out/schedule/is_student_phase"].tolist()
    traced = jax.jit(lambda i: (rcm.student_updates(config, i), rcm.critic_updates(config, i)))(
        put(steps, jnp.int32)
    )
    np.testing.assert_array_equal(traced[0], g["out/schedule/effective_iteration"])
    np.testing.assert_array_equal(traced[1], g["out/schedule/effective_iteration_fake"])
    ema = EMAConfig(width=0.1)
    np.testing.assert_allclose(exponent(0.1), g.config["ema_exp_coefficient"], rtol=1e-12)
    beta = ema_beta(ema, put(steps, jnp.int32))
    assert_close(beta, g["out/schedule/ema_beta_rate0.1"], "sampler")


def test_every_group_of_the_file_is_used(golden):
    groups = {key.split("/")[1] for key in golden("train_targets").keys("out/")}
    assert groups == {
        "scaling",
        "time",
        "denoise",
        "scm_warm0.3",
        "scm_warm1",
        "scm_fd1_h0.01",
        "scm_fd2_h0.01",
        "dcm",
        "dmd",
        "critic",
        "schedule",
    }
