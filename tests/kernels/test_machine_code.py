"""Disassembly is read as it is meant, on snippets short enough to check by eye."""

import dataclasses

import pytest

from mpcore_audit import amdgcn, sass
from mpcore_audit.blocks import Block, Instruction
from mpcore_audit.facts import fused_on_nvidia
from mpcore_audit.machine_code import bodies, thread_dependent
from mpcore_audit.rows import plain

# a flag and a size are read by all threads alike; R0 is the thread's index
SASS = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC.64 R4, c[0x0][0x210] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDG.E.64 R6, desc[UR6][R4.64] ;
        /*0030*/                   IMAD.WIDE.U32 R8, R0, 0x10, R6 ;
        /*0040*/                   ISETP.GT.AND P0, PT, R4, 0x1, PT ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   LDG.E.128 R12, desc[UR6][R8.64] ;
        /*0070*/                   LDG.E.128 R16, desc[UR6][R8.64+0x1000] ;
        /*0080*/                   STG.E.128 desc[UR6][R8.64], R12 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*00b0*/              @!P0 LDG.E.U16 R12, desc[UR6][R8.64] ;
        /*00c0*/              @!P1 LDG.E R13, desc[UR6][R8.64+0x4] ;
        /*00d0*/                   STS.64 [R9+UR4], R12 ;
        /*00e0*/                   LDS R14, [R9+UR4] ;
        /*00f0*/              @!P0 STG.E.U8 desc[UR6][R8.64], R14 ;
.L_x_1:
        /*0100*/              @!P2 EXIT ;
        /*0110*/                   STG.E desc[UR6][R4.64], R2 ;
        /*0120*/                   EXIT ;
.L_x_2:
        /*0130*/                   BRA `(.L_x_2);
        /*0140*/                   NOP;


//--------------------- .nv.shared.kernel --------------------------
        /*0150*/                   BAR.SYNC 0x0 ;
"""

AMD = """kernel:
.Lfunc_begin0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 4, v0             ; the thread's index
	s_cbranch_vccz .LBB0_2
; %bb.1:
	buffer_load_ushort v2, v1, s[4:7], 0 offen
	ds_write_b32 v3, v2
	s_barrier
	ds_bpermute_b32 v4, v5, v2
	buffer_store_dword v2, v1, s[4:7], 0 offen
	s_cbranch_scc0 .LBB0_2
	s_branch .LBB0_3
.LBB0_2:
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	v_fma_f32 v8, v4, v5, v6
	v_fma_mix_f32 v9, v7, s4, neg(0) op_sel_hi:[1,0,0]
	global_store_dwordx2 v1, v[4:5], s[2:3]
.LBB0_3:
	v_mov_b32_e32 v0, 0
	global_store_dword v0, v9, s[2:3]
	s_endpgm
.Lfunc_end0:
	s_barrier
"""


def summary(body):
    return dict(body.loads), dict(body.stores), body.barriers, body.shared, body.instructions


def instructions(blocks):
    return [instruction for block in blocks for instruction in block.instructions]


def test_sass_full_chunks_take_the_path_with_the_fewest_accesses():
    full, masked = bodies(sass.parse(SASS), frozenset(), 16)
    assert summary(full) == ({16: 2}, {16: 1}, 1, 0, 14)
    assert summary(masked) == ({2: 1, 4: 1}, {1: 1}, 0, 2, 14)
    assert (full.bytes, full.accesses, full.loops) == (48, 3, False)


def test_sass_accesses_at_addresses_that_all_threads_share_are_not_those_of_elements():
    blocks = sass.parse(SASS)
    found = thread_dependent(blocks, frozenset())
    by_opcode = [
        (instruction.opcode, is_element)
        for block in blocks
        for instruction, is_element in zip(block.instructions, found[block.label], strict=True)
        if instruction.memory == "global"
    ]
    assert [opcode for opcode, is_element in by_opcode if not is_element] == ["LDG.E.64", "STG.E"]


def test_sass_outside_the_code_is_not_read():
    assert sum(i.barrier for i in instructions(sass.parse(SASS))) == 1


def test_sass_a_register_forgets_the_thread_when_it_is_overwritten():
    code = SASS.replace("LDC.64 R4, c[0x0][0x210]", "S2R R4, SR_TID.X")
    (first, *_) = sass.parse(code.replace("S2R R0, SR_TID.X", "LDC.64 R4, c[0x0][0x210]"))
    assert thread_dependent([Block("entry", first.instructions)], frozenset())["entry"][2] is False
    # a predicate may have kept the old value
    kept = code.replace("     S2R R0, SR_TID.X", " @P0 LDC.64 R4, c[0x0][0x210]")
    (first, *_) = sass.parse(kept)
    assert thread_dependent([Block("entry", first.instructions)], frozenset())["entry"][2] is True


def test_sass_a_uniform_path_that_goes_nowhere_is_no_body():
    assert (
        len(
            bodies(
                sass.parse(
                    SASS.replace("LDG.E.U16", "LDC")
                    .replace("STG.E.U8", "LDC")
                    .replace("LDG.E R13", "LDC R13")
                ),
                frozenset(),
                16,
            )
        )
        == 1
    )


def test_sass_loops_around_elements_are_seen():
    looped = SASS.replace("STS.64 [R9+UR4], R12 ;", "BRA `(.L_x_0) ;")
    without_exit = looped.replace(
        "BRA `(.L_x_0) ;\n        /*00e0*/", "@P3 BRA `(.L_x_0) ;\n        /*00e0*/"
    )
    _, masked = bodies(sass.parse(without_exit), frozenset(), 16)
    assert masked.loops


def test_sass_threads_that_wait_go_on_where_the_region_ends():
    code = SASS.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "BSSY B0, `(.L_x_1)").replace(
        "BRA `(.L_x_1)", "BSYNC B0"
    )
    by_label = {block.label: block for block in sass.parse(code)}
    (block,) = [b for b in by_label.values() if any(i.opcode == "BSYNC" for i in b.instructions)]
    assert block.successors == [".L_x_1"]


REGIONS = """
	.text.kernel:
        /*0000*/                   BSSY B0, `(.L_x_1) ;
        /*0010*/              @P0 BRA `(.L_x_0) ;
        /*0020*/                   FADD R1, R1, R1 ;
.L_x_0:
        /*0030*/                   BSYNC B0 ;
.L_x_1:
        /*0040*/                   BSSY B0, `(.L_x_3) ;
        /*0050*/              @P0 BRA `(.L_x_2) ;
        /*0060*/                   FMUL R1, R1, R1 ;
.L_x_2:
        /*0070*/                   BSYNC B0 ;
.L_x_3:
        /*0080*/                   EXIT ;
"""


def test_sass_regions_one_after_the_other_may_share_a_register():
    by_label = {block.label: block for block in sass.parse(REGIONS)}
    assert by_label[".L_x_0"].successors == [".L_x_1"]
    assert by_label[".L_x_2"].successors == [".L_x_3"]
    nested = REGIONS.replace("FADD R1, R1, R1", "BSSY B1, `(.L_x_0)").replace(
        ".L_x_0:", "        /*0028*/                   BSYNC B1 ;\n.L_x_0:"
    )
    blocks = sass.parse(nested)
    assert [b.successors for b in blocks if b.instructions[-1].opcode == "BSYNC"] == [
        [".L_x_0"],
        [".L_x_1"],
        [".L_x_3"],
    ]


def test_sass_local_memory_is_told_apart():
    code = SASS.replace("STS.64 [R9+UR4], R12", "STL.64 [R1+0x8], R12")
    assert [i.opcode for i in instructions(sass.parse(code)) if i.memory == "local"] == ["STL.64"]


def test_sass_fused_multiply_adds_are_counted_but_not_constants():
    assert sass.fused(SASS) == 0
    line = "        /*0012*/                   {} ;\n        /*0020*/"
    for real in ("FFMA R5, R6, R7, R8", "@P0 DFMA R5, R6, R7, R8", "FFMA2 R4, R6, R8, R10"):
        assert sass.fused(SASS.replace("        /*0020*/", line.format(real))) == 1
        assert sass.adds_zero(SASS.replace("        /*0020*/", line.format(real))) == 0
    for zero in ("FFMA R5, R6, R7, RZ", "HFMA2 R5, R6.H0_H0, R7, RZ.H0_H0"):
        assert sass.adds_zero(SASS.replace("        /*0020*/", line.format(zero))) == 1
    minus = "FFMA R5, R6, RZ, -RZ"
    assert sass.adds_zero(SASS.replace("        /*0020*/", line.format(minus))) == 0
    constant = "HFMA2.MMA R5, -RZ, RZ, 0, RZ"
    assert sass.adds_zero(SASS.replace("        /*0020*/", line.format(constant))) == 0
    constant = "HFMA2.MMA R5, -RZ, RZ, 0, 1.5"
    assert sass.fused(SASS.replace("        /*0020*/", line.format(constant))) == 0


def test_sass_pairs_fused_by_the_assembler_are_found_beside_a_routine():
    line = "        /*0012*/                   {} ;\n        /*0020*/"
    routine = SASS.replace("        /*0020*/", line.format("FFMA R5, R6, R7, R8"))
    pair = SASS.replace("        /*0020*/", line.format("@P0 FFMA2 R4, R6, R8, R10"))
    packed = "\tmul.rn.f32x2 %rd1, %rd2, %rd3;\n\tadd.rn.f32x2 %rd4, %rd1, %rd5;\n"
    division = packed + "\tdiv.rn.f32 %r1, %r2, %r3;\n"
    assert fused_on_nvidia(routine, division) == 0
    assert fused_on_nvidia(routine, packed) == 1
    for ptx in (packed, division):
        assert fused_on_nvidia(SASS, ptx) == 0
        assert fused_on_nvidia(pair, ptx) == 1
    loose = division + "\tmul.f32 %r1, %r2, %r3;\n"
    assert fused_on_nvidia(SASS, loose) == 1


def test_amd_full_chunks_take_one_body_though_the_code_could_run_both():
    full, masked = bodies(amdgcn.parse(AMD), amdgcn.ENTRY, 24)
    assert summary(full) == ({16: 1}, {8: 1}, 0, 0, 10)
    assert summary(masked) == ({2: 1}, {4: 1}, 1, 1, 13)


def test_amd_a_store_by_one_thread_is_not_that_of_an_element():
    blocks = amdgcn.parse(AMD)
    found = thread_dependent(blocks, amdgcn.ENTRY)
    last = blocks[-1]
    assert last.instructions[1].access == "store"
    assert found[last.label][1] is False


def test_amd_exchanges_between_threads_are_no_accesses_to_shared_memory():
    found = [i.opcode for i in instructions(amdgcn.parse(AMD)) if i.memory == "shared"]
    assert found == ["ds_write_b32"]


def test_amd_scratch_is_local_memory():
    code = AMD.replace("s_barrier\n\tds_bp", "scratch_store_dword off, v2, s0\n\tds_bp")
    assert [i.opcode for i in instructions(amdgcn.parse(code)) if i.memory == "local"] == [
        "scratch_store_dword"
    ]


def test_amd_adding_minus_zero_is_no_fused_multiply_add():
    assert amdgcn.fused(AMD) == 1
    assert amdgcn.fused(AMD.replace("neg(0)", "v1")) == 2
    assert amdgcn.adds_zero(AMD) == 0


@pytest.mark.parametrize(
    "product",
    [
        "v_fma_mixlo_f16 v9, s4, v7, 0 op_sel_hi:[0,1,0]",
        "v_fma_mixhi_f16 v9, s4, v7, 0",
        "v_fma_f32 v9, v7, s4, 0",
        "v_fmaak_f32 v9, v7, s4, 0x0",
        "v_pk_fma_f32 v[8:9], v[6:7], s[4:5], 0 op_sel_hi:[1,1,0]",
        "v_fma_f64 v[8:9], v[6:7], s[4:5], 0",
    ],
)
def test_amd_adding_plus_zero_is_seen(product):
    line = "v_fma_mix_f32 v9, v7, s4, neg(0) op_sel_hi:[1,0,0]"
    assert amdgcn.adds_zero(AMD.replace(line, product)) == 1
    assert amdgcn.fused(AMD.replace(line, product)) == 2


def test_amd_constants_of_fused_multiply_adds_are_not_taken_for_zero():
    line = "v_fma_mix_f32 v9, v7, s4, neg(0) op_sel_hi:[1,0,0]"
    for other in (
        "v_fmamk_f32 v9, v7, 0x0, v8",
        "v_fmac_f32_e32 v9, v7, v0",
        "v_fma_f32 v9, 0, v7, 1.0",
    ):
        assert amdgcn.adds_zero(AMD.replace(line, other)) == 0
        assert amdgcn.fused(AMD.replace(line, other)) == 2


def test_what_one_thread_writes_behind_a_jump_counts_for_the_chunk():
    # all threads but one jump over the stores
    code = SASS.replace("@!P2 EXIT", "@P2 BRA `(.L_x_3)").replace(
        "EXIT ;\n.L_x_2:",
        "RED.E.ADD.64.STRONG.GPU desc[UR6][R4.64], R2 ;\n.L_x_3:\n"
        "        /*0121*/                   EXIT ;\n.L_x_2:",
    )
    full, masked = bodies(sass.parse(code), frozenset(), 16)
    assert (dict(full.results), full.atomics) == ({4: 1}, 1)
    assert (dict(masked.results), masked.atomics) == ({4: 1}, 1)
    assert full.bytes_per_chunk == 4
    assert dict(full.stores) == {16: 1}


def test_what_one_thread_jumps_to_and_writes_counts_for_the_chunk():
    jump = "@P2 BRA `(.L_x_5) ;\n        /*0101*/                   EXIT ;\n.L_x_5:"
    code = SASS.replace("@!P2 EXIT ;", jump)
    for body in bodies(sass.parse(code), frozenset(), 16):
        assert dict(body.results) == {4: 1}


def test_what_a_body_does_can_be_written_as_json():
    full, _ = bodies(sass.parse(SASS), frozenset(), 16)
    assert plain(dataclasses.asdict(full))["loads"] == {"16": 2}


def test_barriers_in_loops_are_seen():
    full, masked = bodies(sass.parse(SASS), frozenset(), 16)
    assert not full.waits_in_a_loop
    looped = SASS.replace(
        "        /*00a0*/", "        /*0091*/    @P4 BRA `(.L_x_4) ;\n        /*00a0*/"
    )
    looped = looped.replace("        /*0090*/", ".L_x_4:\n        /*0090*/")
    full, masked = bodies(sass.parse(looped), frozenset(), 16)
    assert (full.waits_in_a_loop, full.loops, masked.waits_in_a_loop) == (True, False, False)


def test_a_path_that_moves_too_little_is_not_that_of_a_full_chunk():
    access = Instruction("LD", address=frozenset("t"), memory="global", access="load", width=16)
    other = Instruction("ADD")
    blocks = [
        Block("entry", [other], ["all", "some"]),
        Block("some", [access], []),
        Block("all", [access, access, other], []),
    ]
    full, *_ = bodies(blocks, frozenset("t"), 32)
    assert full.labels == {"all"}
    full, *_ = bodies(blocks, frozenset("t"), 16)
    assert full.labels == {"some"}


def test_more_paths_than_can_be_compared_are_refused():
    access = Instruction("LD", address=frozenset("t"), memory="global", access="load", width=16)
    blocks = [Block("0", [], ["a0", "1"])]
    for i in range(1, 12):
        blocks += [Block(f"a{i - 1}", [access], [str(i)]), Block(str(i), [], [f"a{i}", str(i + 1)])]
    blocks[-1].successors.clear()
    with pytest.raises(RuntimeError, match="fewer branches"):
        bodies(blocks, frozenset("t"), 16)
