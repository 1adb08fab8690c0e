"""The traps of docs/traps.md as changes of the source: what putting each of them back would look like.

Every old text occurs exactly once in its file, so that this list breaks loudly when code moves.
"""

from __future__ import annotations

from dataclasses import dataclass

Edit = tuple[str, str]  # old text, new text


@dataclass(frozen=True, slots=True)
class Change:
    """One form of one trap, in one file of the package."""

    trap: int
    form: str
    file: str
    edits: tuple[Edit, ...]

    @property
    def name(self) -> str:
        return f"{self.trap}: {self.form}"

    def applied(self, source: str) -> str:
        """The source with the trap put back."""
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.name}: {self.file} has {source.count(old)} times: {old}"
            source = source.replace(old, new)
        return source


def _change(trap: int, form: str, file: str, *edits: Edit) -> Change:
    return Change(trap, form, f"cola_runtime/{file}", edits)


_STACKS = "base_model/stacks"
_DETACHED = "if dx_BTI is not None and False:"

CHANGES: tuple[Change, ...] = (
    _change(
        1,
        "LoRA detached from the path to x",
        f"{_STACKS}/lora.py",
        ("self.rows.of(dx_BTI).baddbmm_(gb_SMQ, self.factors.a_SQI)", "pass"),
    ),
    _change(
        1,
        "LoRA with dropout detached from the path to x",
        f"{_STACKS}/lora_dropout.py",
        ("self.rows.of(dx_BTI).add_(dropped_SMI)", "pass"),
    ),
    _change(
        1,
        "full-rank adapter detached from the path to x",
        f"{_STACKS}/linear.py",
        ("if dx_BTI is not None:", _DETACHED),
    ),
    _change(1, "MLP detached from the path to x", f"{_STACKS}/mlp.py", ("if dx_BTI is not None:", _DETACHED)),
    _change(
        1,
        "registered module detached from the path to x",
        f"{_STACKS}/module.py",
        ("if dx_BTI is not None:", _DETACHED),
    ),
    _change(
        2,
        "scaling twice in dB on the device",
        "adapters/lora.py",
        ("self._b: s * (grad_NO.T @ (x_NI", "self._b: s * s * (grad_NO.T @ (x_NI"),
    ),
    _change(
        2,
        "scaling never in dB of a weight gradient",
        "adapters/lora.py",
        ("self._b: s * (product_OI @", "self._b: (product_OI @"),
    ),
    _change(
        2,
        "scaling twice in the base model's forward",
        f"{_STACKS}/lora.py",
        ("flat[self._a_numel :] *= scaling", "flat[self._a_numel :] *= scaling * scaling"),
    ),
    _change(
        2,
        "scaling twice in the base model's dA",
        f"{_STACKS}/lora.py",
        (
            "torch.bmm(gb_SMQ.transpose(1, 2), x_SMI).to(self.taps.dtype)",
            "self.taps.scale(torch.bmm(gb_SMQ.transpose(1, 2), x_SMI))",
        ),
    ),
    _change(
        2,
        "rsLoRA's scaling taken for LoRA's",
        "adapter_spec.py",
        ("return alpha / rank**0.5 if use_rslora else alpha / rank", "return alpha / rank"),
    ),
    _change(
        2,
        "mean over rows instead of a sum on the device",
        "adapters/lora.py",
        (
            "(grad_NO.T @ (x_NI @ weights[self._a].T))",
            "(grad_NO.T @ (x_NI @ weights[self._a].T)) / len(x_NI)",
        ),
    ),
    _change(
        2,
        "mean over rows instead of a sum in the base model",
        f"{_STACKS}/lora.py",
        (
            "torch.bmm(h_SMR.transpose(1, 2), grad_SMO)",
            "torch.bmm(h_SMR.transpose(1, 2), grad_SMO) / h_SMR.shape[1]",
        ),
    ),
    _change(
        2,
        "mean over rows instead of a sum in a weight gradient",
        "gradients/taps.py",
        (
            "torch.mm(grad_NO.T, x_NI, out=product[:, :-1])",
            "torch.mm(grad_NO.T / len(x_NI), x_NI, out=product[:, :-1])",
        ),
    ),
    _change(
        3,
        "labels normalised over the mixed batch",
        "base_model/segments.py",
        ("scales = label_weights / denominators[row]", "scales = label_weights / label_weights.sum()"),
    ),
    _change(
        3,
        "labelled rows normalised over themselves, not over the step",
        "base_model/heads.py",
        ("losses_n.sum() / loss_denominator", "losses_n.mean() / 2"),
    ),
    _change(
        3,
        "reported loss of one member taken over the whole batch",
        "base_model/loss.py",
        (
            "weights = [float(part.sum()) for part in torch.split(labels.weights_K, list(labels.counts))]",
            "weights = [float(labels.weights_K.sum())] * len(sums)",
        ),
    ),
    _change(
        4,
        "microbatches weighted alike",
        "scheduler/primitives.py",
        (
            "loss_denominator=denominator,",
            "loss_denominator=len(parts) * sum(row.loss_weight for row in part),",
        ),
    ),
    _change(
        4,
        "remainder of a pass dropped",
        "data/cursor.py",
        ("return -(-row_count // spec.rows_per_step)", "return max(1, row_count // spec.rows_per_step)"),
    ),
    _change(
        4,
        "schedule counted in microbatches",
        "jobs/plan.py",
        ("total_steps=total_steps\n    )", "total_steps=total_steps * spec.adaptation_interval\n    )"),
    ),
    _change(
        4,
        "last microbatch alone makes the step",
        "device/session.py",
        (
            "        self._check_version(version)\n        self._accumulator.add(key, tensor, self._weights)",
            "        self._check_version(version)\n"
            "        if key in (seen := self.__dict__.setdefault('seen', set())):\n"
            "            self._accumulator.clear()\n"
            "            seen.clear()\n"
            "        seen.add(key)\n"
            "        self._accumulator.add(key, tensor, self._weights)",
        ),
    ),
    _change(
        5,
        "clipped tensor by tensor",
        "device/session.py",
        (
            "torch.nn.utils.clip_grads_with_norm_(list(self._weights.values()), limit, norm)",
            "[torch.nn.utils.clip_grad_norm_([parameter], limit) for parameter in self._weights.values()]",
        ),
    ),
    _change(
        5,
        "a neighbour's step steps and decays absent tenants too",
        "device/worker.py",
        (
            "        applied = held.session.apply(version=version)\n",
            "        for other in self._held.values():\n"
            "            if other is not held:\n"
            "                other.session._step(other.session._accumulator.gradients())\n"
            "        applied = held.session.apply(version=version)\n",
        ),
    ),
    _change(
        6,
        "merged by += and -=",
        "base_model/merge.py",
        (
            "        self._members = None\n",
            "        before, self._members = self._members or (), None\n",
        ),
        (
            "        for index in self._changed - sites:\n            self._restore(index)\n",
            "        for member, share in _shares(before):\n"
            "            for index in member.sites:\n"
            "                self._add(index, member, -share)\n",
        ),
        ("        target_OI.zero_()\n", ""),
        ("        target_OI.add_(self._pristine_OI[index])\n", ""),
    ),
    _change(
        6,
        "delta below the resolution of a bfloat16 weight merged all the same",
        "adapters/mergeable.py",
        ("    if dtype not in WIDE_DTYPES:\n", "    if dtype not in (*WIDE_DTYPES, 'bfloat16'):\n"),
    ),
    _change(
        7,
        "every real row kept, whether it reaches a loss or not",
        "gradients/taps.py",
        ("rows = _any_nonzero(list(grads.values())).nonzero().squeeze(1)", "rows = torch.arange(len(x_NI))"),
    ),
    _change(
        7,
        "rows dropped by one site's g for all sites of the group",
        "gradients/taps.py",
        ("_any_nonzero(list(grads.values()))", "_any_nonzero(list(grads.values())[:1])"),
    ),
    _change(
        8,
        "Conv1D's square weight taken as [out, in]",
        "base_model/tapped.py",
        (
            "return weight if site.kind is SiteKind.LINEAR else weight.t()",
            "return weight if site.kind is SiteKind.LINEAR or len(set(weight.shape)) == 1 else weight.t()",
        ),
    ),
    _change(
        8,
        "Conv1D's shape taken as [out, in]",
        "base_model/catalogue.py",
        (
            "return (rows, columns) if _kind(module) is SiteKind.LINEAR else (columns, rows)",
            "return rows, columns",
        ),
    ),
    _change(
        8,
        "tied weights merged for both modules",
        "base_model/load.py",
        ("tied_sites=_tied_sites(model, sites),", "tied_sites=(),"),
    ),
    _change(
        8,
        "a module's second call replaces the first one's gradient",
        "gradients/accumulate.py",
        ("        total.add_(tensor)\n", "        total.copy_(tensor)\n"),
    ),
    _change(
        8,
        "query heads of short rows dealt out to the wrong key head",
        "base_model/attention.py",
        (
            "        q_ZQE = q.view(products, -1, self.head_size)\n",
            "        q_ZQE = q.unflatten(1, (self.groups, -1)).transpose(1, 2)\n"
            "        q_ZQE = q_ZQE.reshape(products, -1, self.head_size)\n",
        ),
    ),
    _change(
        8,
        "query heads of long rows dealt out to the wrong key head",
        "base_model/attention.py",
        ("keys_BKTE.repeat_interleave(self.groups, dim=1)", "keys_BKTE.repeat(1, self.groups, 1, 1)"),
    ),
    _change(
        8,
        "rows flattened into tokens unflattened token by token",
        "base_model/tapped.py",
        (
            "x_BTI = x.reshape(self._owner.rows, -1, x.shape[-1])",
            "x_BTI = x if x.ndim == 3 else x.reshape(-1, self._owner.rows, x.shape[-1]).transpose(0, 1)",
        ),
    ),
    _change(
        9,
        "adapters selected by a one-hot product",
        f"{_STACKS}/lora.py",
        (
            "self.rows.of(outputs_BTO[position]).baddbmm_(h_SMR, b_SOR.transpose(1, 2))",
            "self.rows.of(outputs_BTO[position]).add_(\n"
            "                torch.einsum('st,smr,tor->smo', torch.eye(len(h_SMR)).to(h_SMR), h_SMR, b_SOR)\n"
            "            )",
        ),
    ),
    _change(
        9,
        "losses selected by masks",
        "base_model/loss.py",
        (
            "sums = [float(part.sum()) for part in torch.split(weighted_K, list(labels.counts))]",
            "members = torch.arange(len(labels.counts))\n"
            "    owner_K = torch.repeat_interleave(members, torch.tensor(labels.counts))\n"
            "    sums = [float((weighted_K * (owner_K == k)).sum()) for k in range(len(labels.counts))]",
        ),
    ),
    _change(
        9,
        "heads' gradients scattered by a one-hot product",
        "base_model/head_loss.py",
        (
            "grad_ND.index_copy_(0, positions_n, gradients.hidden_nD)",
            "grad_ND.add_((positions_n[None] == positions_n.new_tensor(range(len(grad_ND)))[:, None])"
            ".to(grad_ND) @ gradients.hidden_nD.to(grad_ND))",
        ),
    ),
    _change(
        10,
        "g times p_k, as the joint gradient has it",
        f"{_STACKS}/merged.py",
        (
            "        self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))\n",
            "        weights = [member.membership.weight for member in self.members]\n"
            "        shares_S11 = x_SMI.new_tensor(weights)[:, None, None] / sum(weights)\n"
            "        grads_SMO = {site: grad_SMO * shares_S11 for site, grad_SMO in grads_SMO.items()}\n"
            "        self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))\n",
        ),
    ),
    _change(
        10,
        "mean(B) mean(A) merged instead of mean(B A)",
        "base_model/merge.py",
        (
            "        for member, share in shares:\n"
            "            if index in member.sites:\n"
            "                self._add(index, member, share)\n",
            "        from dataclasses import replace\n\n"
            "        mean = {\n"
            "            key: sum(share * member.weights[index][key] for member, share in shares)\n"
            "            for key in shares[0][0].weights[index]\n"
            "        }\n"
            "        self._add(index, replace(shares[0][0], weights={index: mean}), 1.0)\n",
        ),
    ),
    _change(
        11,
        "a tap of any version taken by the device",
        "device/session.py",
        ("        if version != self.version:\n", "        if version > self.version:\n"),
    ),
    _change(
        11,
        "a stale tap taken at the present weights",
        "device/session.py",
        (
            "self._accumulator.add(key, tensor, self._previous)",
            "self._accumulator.add(key, tensor, self._weights)",
        ),
    ),
    _change(
        11,
        "rows computed with whatever version is in the bank",
        "base_model/bank.py",
        (
            "(\n                segment.lease.epoch,\n                segment.version,\n            )",
            "(\n                segment.lease.epoch,\n                adapter.version,\n            )",
        ),
    ),
)
QUICK = CHANGES[5]  # what every run of the tests takes
