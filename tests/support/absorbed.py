"""Random cases of absorbed MLA: `with_qv` turns a drawn plan into one, as plans with qv are drawn rarely."""

from __future__ import annotations

import dataclasses

from tests.support.cases import DENSE, Plan


def with_qv(plan: Plan, head_dim_v: int, *, only_qv: bool = False) -> Plan:
    """The plan with keys of 64, values of `head_dim_v` and qv; as it is where its rotation is wider than that."""
    if plan.rotary_dim > 64:
        return plan
    return dataclasses.replace(plan, d=64, dv=head_dim_v, qv=True, only_qv=only_qv and plan.function != DENSE)
