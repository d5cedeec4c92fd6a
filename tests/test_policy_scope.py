"""The global policy: set, read, scoped, and local to a thread's context."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.policy import Policy
from mpcore.policy_scope import global_policy, set_global_policy, use_policy


def in_fresh_context(function: Any) -> Any:
    """Runs `function` so that what it sets is gone afterwards."""
    return contextvars.Context().run(function)


def test_global_policy_is_float32_until_it_is_set() -> None:
    assert in_fresh_context(global_policy) == Policy("float32")


@pytest.mark.parametrize("policy", ["mixed_float16", Policy("mixed_float16")])
def test_global_policy_can_be_set_by_name_or_value(policy: Any) -> None:
    def run() -> None:
        set_global_policy(policy)
        assert global_policy() == Policy("mixed_float16")

    in_fresh_context(run)


def test_use_policy_restores_the_policy_before_it_also_after_an_exception() -> None:
    def run() -> None:
        set_global_policy("bfloat16")
        with use_policy("float16") as outer:
            assert global_policy() is outer
            with pytest.raises(ArgumentError), use_policy(Policy("mixed_bfloat16")) as inner:
                set_global_policy(f"no {inner.name}")
            assert global_policy() is outer
        assert global_policy() == Policy("bfloat16")

    in_fresh_context(run)


def test_setting_a_policy_in_one_thread_leaves_the_others_alone() -> None:
    seen: list[Policy] = []

    def other() -> None:
        set_global_policy("float16")
        seen.append(global_policy())

    thread = threading.Thread(target=lambda: in_fresh_context(other))
    thread.start()
    thread.join()
    assert seen == [Policy("float16")]
    assert global_policy() == Policy("float32")


def test_async_tasks_inherit_the_policy_and_keep_changes_to_themselves() -> None:
    async def task() -> Policy:
        inherited = global_policy()
        set_global_policy("float16")
        return inherited

    async def main() -> tuple[Policy, Policy]:
        set_global_policy("mixed_float16")
        inherited = await asyncio.create_task(task())
        return inherited, global_policy()

    mixed = Policy("mixed_float16")
    assert in_fresh_context(lambda: asyncio.run(main())) == (mixed, mixed)


@pytest.mark.parametrize(
    ("policy", "kind", "text"),
    [
        ("fp16", ArgumentError, "name: .* got 'fp16'"),
        (None, ArgumentTypeError, "policy: .* got NoneType"),
        (16, ArgumentTypeError, "policy: .* got int"),
    ],
)
def test_impossible_policies_raise_and_leave_the_global_one(
    policy: Any, kind: type[Exception], text: str
) -> None:
    def run() -> None:
        set_global_policy("bfloat16")
        with pytest.raises(kind, match=text):
            set_global_policy(policy)
        with pytest.raises(kind, match=text), use_policy(policy):
            pass
        assert global_policy() == Policy("bfloat16")

    in_fresh_context(run)
