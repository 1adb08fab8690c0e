"""Traps 6 to 11: merging, rows, architectures, isolation, collaboration, versions."""

from __future__ import annotations

from tests.traps.change import Change, changed

_STACKS = "base_model/stacks"

BASE_MODEL_CHANGES: tuple[Change, ...] = (
    changed(
        6,
        "merged by += and -=",
        "test_a_thousand_merges_leave_the_base_bit_identical",
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
    changed(
        6,
        "delta below the resolution of a bfloat16 weight merged all the same",
        "test_the_base_model_itself_refuses_what_cannot_be_merged",
        "adapters/mergeable.py",
        ("    if dtype not in WIDE_DTYPES:\n", "    if dtype not in (*WIDE_DTYPES, 'bfloat16'):\n"),
    ),
    changed(
        7,
        "every real row kept, whether it reaches a loss or not",
        "test_rows_that_reach_no_loss_are_dropped",
        "gradients/taps.py",
        ("used_N.nonzero().squeeze(1)", "torch.arange(len(used_N))"),
    ),
    changed(
        7,
        "rows dropped by one site's g for all sites of the group",
        "test_every_tenant_gets_the_gradient_and_loss_it_gets_alone",
        "gradients/taps.py",
        ("    silent = (~used_SN)", "    grads_SNO = grads_SNO[:1]\n    silent = (~used_SN)"),
        ("    for grad_SNO in grads_SNO[1:]:\n        used_SN |= grad_SNO[..., 0] != 0\n", ""),
    ),
    changed(
        8,
        "Conv1D's square weight taken as [out, in]",
        "test_gradients_of_all_kinds_are_autograds",
        "adapters/site_modules.py",
        (
            "if site.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING):",
            "if site.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING) and len(set(weight.shape)) > 1:",
        ),
    ),
    changed(
        8,
        "Conv1D's shape taken as [out, in]",
        "test_gpt2s_sites_are_conv1d_and_its_head_is_none",
        "adapters/site_modules.py",
        (
            "return (rows, columns) if kind is SiteKind.LINEAR else (columns, rows)",
            "return rows, columns",
        ),
    ),
    changed(
        8,
        "tied weights merged for both modules",
        "test_a_site_whose_weight_is_another_modules_is_told_and_refused",
        "base_model/load.py",
        ("    tied_sites = _tied_sites(model, sites)\n", "    tied_sites: tuple[int, ...] = ()\n"),
    ),
    changed(
        8,
        "a module's second call replaces the first one's gradient",
        "test_a_module_called_twice_gets_the_sum_of_both_gradients",
        "gradients/accumulate.py",
        ("            sums.add_(values)\n", "            sums.copy_(values)\n"),
    ),
    changed(
        8,
        "query heads of short rows dealt out to the wrong key head",
        "test_gradients_of_all_kinds_are_autograds",
        "base_model/attention.py",
        (
            "        q_ZQE = q_BHTE.view(products, -1, self.head_size)\n",
            "        q_ZQE = q_BHTE.unflatten(1, (self.groups, -1)).transpose(1, 2)\n"
            "        q_ZQE = q_ZQE.reshape(products, -1, self.head_size)\n",
        ),
    ),
    changed(
        8,
        "query heads of long rows dealt out to the wrong key head",
        "test_long_rows_take_flash_attention_and_keep_their_gradient",
        "base_model/attention_kernels.py",
        ("keys_BKTE.repeat_interleave(groups, dim=1)", "keys_BKTE.repeat(1, groups, 1, 1)"),
    ),
    changed(
        8,
        "rows flattened into tokens unflattened token by token",
        "test_gradients_of_all_kinds_are_autograds",
        "base_model/site_groups.py",
        (
            "return x.reshape(rows, -1, x.shape[-1])",
            "return x if x.ndim == 3 else x.reshape(-1, rows, x.shape[-1]).transpose(0, 1)",
        ),
    ),
    changed(
        8,
        "a layer that is computed again taken for the one computed last",
        "test_every_tap_leaves_once_and_is_that_of_the_plain_pass",
        "base_model/llama.py",
        ("if kept and not self._checkpointing:", "if kept:"),
    ),
    changed(
        9,
        "adapters selected by a one-hot product",
        "test_a_nan_adapter_leaves_its_neighbours_bit_identical",
        f"{_STACKS}/lora.py",
        (
            "self.rows.of(outputs_BTO[position]).baddbmm_(h_SMR, b_SOR.transpose(1, 2))",
            "self.rows.of(outputs_BTO[position]).add_(\n"
            "                torch.einsum('st,smr,tor->smo', torch.eye(len(h_SMR)).to(h_SMR), h_SMR, b_SOR)\n"
            "            )",
        ),
    ),
    changed(
        9,
        "losses selected by masks",
        "test_a_nan_adapter_leaves_its_neighbours_bit_identical",
        "base_model/loss.py",
        (
            "sums = [float(part.sum()) for part in torch.split(weighted_K, list(labels.counts))]",
            "members = torch.arange(len(labels.counts))\n"
            "    owner_K = torch.repeat_interleave(members, torch.tensor(labels.counts))\n"
            "    sums = [float((weighted_K * (owner_K == k)).sum()) for k in range(len(labels.counts))]",
        ),
    ),
    changed(
        9,
        "heads' gradients scattered by a one-hot product",
        "test_a_neighbours_nan_head_reaches_nobody",
        "base_model/head_loss.py",
        (
            "grad_ND.index_copy_(0, positions_n, gradients.hidden_nD)",
            "grad_ND.add_((positions_n[None] == positions_n.new_tensor(range(len(grad_ND)))[:, None])"
            ".to(grad_ND) @ gradients.hidden_nD.to(grad_ND))",
        ),
    ),
    changed(
        10,
        "g times p_k, as the joint gradient has it",
        "test_a_collaboration_is_not_the_joint_gradient",
        f"{_STACKS}/merged.py",
        (
            "        rows = CohortRows(cohort.span, (1.0,) * len(members))\n",
            "        everybody = [m.adapter.merged.membership.weight for c in cohorts for m in c.members]\n"
            "        shares = tuple(member.membership.weight / sum(everybody) for member in members)\n"
            "        rows = CohortRows(cohort.span, shares)\n",
        ),
        (
            "        self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))\n",
            "        shares_S11 = x_SMI.new_tensor(self.rows.scalings)[:, None, None]\n"
            "        grads_SMO = {site: grad_SMO * shares_S11 for site, grad_SMO in grads_SMO.items()}\n"
            "        self.taps.emit(x_SMI, grads_SMO, lambda: self._gradients(x_SMI, grads_SMO))\n",
        ),
    ),
    changed(
        10,
        "mean(B) mean(A) merged instead of mean(B A)",
        "test_the_mean_of_products_is_merged_and_not_the_product_of_means",
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
    changed(
        11,
        "a tap of any version taken by the device",
        "test_a_tap_of_another_version_is_refused_and_changes_nothing",
        "device/session.py",
        ("        if version != self.version:\n", "        if version > self.version:\n"),
    ),
    changed(
        11,
        "a stale tap taken at the present weights",
        "test_a_stale_tap_is_taken_at_the_weights_of_its_version",
        "device/session.py",
        (
            "return self._previous",
            "return self._weights",
        ),
    ),
    changed(
        11,
        "rows computed with whatever version is in the bank",
        "test_refused_segments_get_their_reason_and_the_others_are_computed",
        "base_model/bank.py",
        (
            "(\n                segment.lease.epoch,\n                segment.version,\n            )",
            "(\n                segment.lease.epoch,\n                adapter.version,\n            )",
        ),
    ),
    changed(
        11,
        "a stale tap taken at merged weights of the present version",
        "test_a_stale_segment_of_a_merged_adapter_sees_the_version_that_it_asks_for",
        "base_model/mixed_pass.py",
        ("self._bank.gang(gang, asked)", "self._bank.gang(gang)"),
    ),
)
