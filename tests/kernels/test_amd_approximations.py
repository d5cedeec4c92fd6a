"""Approximate instructions on AMD are told from the same ones in correctly rounded routines."""

import pytest

from mpcore_audit import amdgcn

# what LLVM makes of a / b, of sqrt(a) and, in float64, of sqrt(a): the arithmetic of each
DIVISION = """
	v_div_scale_f32 v4, s[0:1], v3, v3, v2
	v_rcp_f32_e32 v5, v4
	s_nop 0
	v_fma_f32 v6, -v4, v5, 1.0
	v_fmac_f32_e32 v5, v6, v5
	v_div_scale_f32 v6, vcc, v2, v3, v2
	v_mul_f32_e32 v7, v6, v5
	v_fma_f32 v8, -v4, v7, v6
	v_fmac_f32_e32 v7, v8, v5
	v_fma_f32 v4, -v4, v7, v6
	v_div_fmas_f32 v4, v4, v5, v7
	v_div_fixup_f32 v9, v4, v3, v2
"""
ROOT = """
	v_sqrt_f32_e32 v2, v1
	v_add_u32_e32 v4, -1, v2
	v_add_u32_e32 v5, 1, v2
	v_fma_f32 v6, -v4, v2, v1
	v_fma_f32 v7, -v5, v2, v1
	v_cmp_ge_f32_e64 s[0:1], 0, v6
	v_cndmask_b32_e64 v2, v2, v4, s[0:1]
	v_cmp_lt_f32_e64 s[0:1], 0, v7
	v_cndmask_b32_e64 v2, v2, v5, s[0:1]
"""
ROOT_64 = """
	v_rsq_f64_e32 v[2:3], v[0:1]
	v_mul_f64 v[8:9], v[0:1], v[2:3]
	v_mul_f64 v[2:3], v[2:3], 0.5
	v_fma_f64 v[10:11], -v[2:3], v[8:9], 0.5
	v_fmac_f64_e32 v[8:9], v[8:9], v[10:11]
	v_fma_f64 v[12:13], -v[8:9], v[8:9], v[0:1]
	v_fmac_f64_e32 v[2:3], v[2:3], v[10:11]
	v_fmac_f64_e32 v[8:9], v[12:13], v[2:3]
	v_fma_f64 v[10:11], -v[8:9], v[8:9], v[0:1]
	v_fmac_f64_e32 v[8:9], v[10:11], v[2:3]
"""


def approximations(code):
    return amdgcn.approximations(f".Lfunc_begin0:\n{code}\ts_endpgm\n.Lfunc_end0:\n")


@pytest.mark.parametrize("routine", [DIVISION, ROOT, ROOT_64, DIVISION + ROOT + DIVISION])
def test_amd_routines_that_round_correctly_are_no_approximations(routine):
    assert approximations(routine) == ()


@pytest.mark.parametrize(
    ("routine", "missing", "found"),
    [
        (DIVISION, "v_div_fixup_f32", "v_rcp_f32"),
        (DIVISION, "v_div_fmas_f32", "v_rcp_f32"),
        (DIVISION, "v_div_scale_f32 v4", "v_rcp_f32"),
        (ROOT, "v_add_u32_e32 v4", "v_sqrt_f32"),
        (ROOT, "v_fma_f32 v7", "v_sqrt_f32"),
        (ROOT_64, "v_fmac_f64_e32 v[8:9], v[10:11], v[2:3]", "v_rsq_f64"),
    ],
)
def test_amd_a_routine_without_one_of_its_steps_is_an_approximation(routine, missing, found):
    lines = routine.splitlines(keepends=True)
    kept = [line for line in lines if missing not in line]
    assert len(kept) == len(lines) - 1
    assert approximations("".join(kept)) == (found,)


@pytest.mark.parametrize(
    "opcode",
    ["v_rcp_f32_e32", "v_rsq_f32_e32", "v_sqrt_f32_e64", "v_rcp_f16", "v_sqrt_f64", "v_exp_f32"],
)
def test_amd_an_approximation_beside_exact_routines_is_found(opcode):
    fast = f"\t{opcode} v20, v2\n\tv_mul_f32_e32 v3, v3, v20\n"
    name = opcode.removesuffix("_e32").removesuffix("_e64")
    for code in (fast + DIVISION, DIVISION + ROOT + fast, DIVISION + fast + ROOT):
        assert approximations(code) == (name,)


def test_amd_the_start_of_an_integer_division_is_no_approximation():
    assert approximations("\n\tv_rcp_iflag_f32_e32 v4, v4\n") == ()


def test_amd_a_routine_that_goes_on_with_another_value_is_an_approximation():
    # the reciprocal is gone before it is refined
    reciprocal = "\tv_rcp_f32_e32 v5, v4\n"
    code = DIVISION.replace(reciprocal, f"{reciprocal}\tv_mov_b32_e32 v5, v30\n")
    assert code != DIVISION
    assert approximations(code) == ("v_rcp_f32",)
