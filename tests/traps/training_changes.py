"""Traps 1 to 5: gradients, scalings, normalisation, intervals, steps."""

from __future__ import annotations

from tests.traps.change import Change, changed

_STACKS = "base_model/stacks"
_DETACHED = "if dx_BTI is not None and False:"

TRAINING_CHANGES: tuple[Change, ...] = (
    changed(
        1,
        "LoRA detached from the path to x",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        f"{_STACKS}/lora.py",
        ("self.rows.of(dx_BTI).baddbmm_(gb_SMQ, self.factors.a_SQI)", "pass"),
    ),
    changed(
        1,
        "LoRA with dropout detached from the path to x",
        "test_every_encoding_gives_the_gradient_of_the_masked_adapter",
        f"{_STACKS}/lora_dropout.py",
        ("self.rows.of(dx_BTI).add_(dropped_SMI)", "pass"),
    ),
    changed(
        1,
        "full-rank adapter detached from the path to x",
        "test_all_kinds_mixed_in_one_batch_are_autograds",
        f"{_STACKS}/linear.py",
        ("if dx_BTI is not None:", _DETACHED),
    ),
    changed(
        1,
        "MLP detached from the path to x",
        "test_all_kinds_mixed_in_one_batch_are_autograds",
        f"{_STACKS}/mlp.py",
        ("if dx_BTI is not None:", _DETACHED),
    ),
    changed(
        1,
        "registered module detached from the path to x",
        "test_a_registered_module_trains_like_autograd",
        f"{_STACKS}/module.py",
        ("if dx_BTI is not None:", _DETACHED),
    ),
    changed(
        2,
        "scaling twice in dB on the device",
        "test_gradient_is_autograds_with_the_scaling_exactly_once",
        "adapters/lora.py",
        ("grad_NO.T @ times(x_NI, a_RI))", "self._kind.scaling * grad_NO.T @ times(x_NI, a_RI))"),
    ),
    changed(
        2,
        "scaling never in dB of a weight gradient",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        "adapters/lora.py",
        ("product_OI @ a_RI.T)", "product_OI @ a_RI.T / self._kind.scaling)"),
    ),
    changed(
        2,
        "scaling twice in the base model's forward",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        f"{_STACKS}/lora.py",
        ("scaling = kind.scaling", "scaling = kind.scaling * kind.scaling"),
    ),
    changed(
        2,
        "scaling twice in the base model's dA",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        f"{_STACKS}/lora.py",
        (
            "outer(gb_SMQ, x_SMI, self.factors.sites[0]).to(self.taps.dtype)",
            "self.taps.scale(outer(gb_SMQ, x_SMI, self.factors.sites[0]))",
        ),
    ),
    changed(
        2,
        "rsLoRA's scaling taken for LoRA's",
        "test_gradient_is_autograds_with_the_scaling_exactly_once",
        "adapter_spec.py",
        ("return alpha / rank**0.5 if use_rslora else alpha / rank", "return alpha / rank"),
    ),
    changed(
        2,
        "mean over rows instead of a sum on the device",
        "test_gradient_sums_over_rows",
        "adapters/lora.py",
        (
            "grad_NO.T @ times(x_NI, a_RI))",
            "grad_NO.T @ times(x_NI, a_RI) / len(x_NI))",
        ),
    ),
    changed(
        2,
        "mean over rows instead of a sum in the base model",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        f"{_STACKS}/lora.py",
        (
            "torch.bmm(h_SMR.transpose(1, 2), grad_SMO)",
            "torch.bmm(h_SMR.transpose(1, 2), grad_SMO) / h_SMR.shape[1]",
        ),
    ),
    changed(
        2,
        "mean over rows instead of a sum in a weight gradient",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        "gradients/taps.py",
        (
            "torch.matmul(grad_NO.mT, x_NI, out=product[..., :-1])",
            "torch.matmul(grad_NO.mT / x_NI.shape[-2], x_NI, out=product[..., :-1])",
        ),
    ),
    changed(
        3,
        "labels normalised over the mixed batch",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        "base_model/segments.py",
        ("scales_K = weights_K / denominators[owners_K]", "scales_K = weights_K / weights_K.sum()"),
    ),
    changed(
        3,
        "labelled rows normalised over themselves, not over the step",
        "test_tenants_with_different_heads_in_one_batch_are_autograds",
        "base_model/heads.py",
        ("losses_n.sum() / loss_denominator", "losses_n.mean() / 2"),
    ),
    changed(
        3,
        "reported loss of one member taken over the whole batch",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        "base_model/loss.py",
        (
            "weights = [float(part.sum()) for part in torch.split(labels.weights_K, list(labels.counts))]",
            "weights = [float(labels.weights_K.sum())] * len(sums)",
        ),
    ),
    changed(
        4,
        "microbatches weighted alike",
        "test_trap_4_every_interval_trains_as_one_batch_a_step_would",
        "scheduler/primitives.py",
        (
            "loss_denominator=denominator,",
            "loss_denominator=len(parts) * sum(row.loss_weight for row in part),",
        ),
    ),
    changed(
        4,
        "remainder of a pass dropped",
        "test_trap_4_every_interval_trains_as_one_batch_a_step_would",
        "data/cursor.py",
        ("return -(-row_count // spec.rows_per_step)", "return max(1, row_count // spec.rows_per_step)"),
    ),
    changed(
        4,
        "warm-up counted in microbatches",
        "test_trap_4_every_interval_trains_as_one_batch_a_step_would",
        "jobs/plan.py",
        (
            "warmup_steps=spec.schedule.warmup_steps,",
            "warmup_steps=spec.schedule.warmup_steps * spec.adaptation_interval,",
        ),
    ),
    changed(
        4,
        "last microbatch alone makes the step",
        "test_trap_4_every_interval_trains_as_one_batch_a_step_would",
        "device/worker.py",
        (
            "            if not end.apply:\n                return None\n",
            "            if not end.apply:\n                return held.session.discard()\n",
        ),
    ),
    changed(
        5,
        "clipped tensor by tensor",
        "test_a_session_is_bitwise_torch_optim",
        "device/session.py",
        (
            "        clip = self._clip(norm_of_all)\n",
            "        clip = None\n"
            "        for part in gradient_P.split(self._layout.sizes):\n"
            "            factor = self._clip(part.norm())\n"
            "            part.mul_(1.0 if factor is None else factor)\n",
        ),
    ),
    changed(
        5,
        "a neighbour's step steps and decays absent tenants too",
        "test_an_absent_tenant_gets_no_step_and_no_decay",
        "device/worker.py",
        (
            "            applied = held.session.apply(version=version, norm=norm)\n",
            "            for other in self._held.values():\n"
            "                if other is not held:\n"
            "                    other.session._step(other.session._accumulator.gradient_vector(), 0.05)\n"
            "            applied = held.session.apply(version=version, norm=norm)\n",
        ),
    ),
)
