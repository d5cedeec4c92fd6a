"""Errors in what a cast model does with buffers and inputs."""

from mutant import engine_mutants

CASTING = [
    *engine_mutants(
        "precision/norms.py",
        ("test_norms.py",),
        (
            "results are FP32",
            "return result.to(input.dtype), mean, rstd",
            "return result, mean, rstd",
        ),
        (
            "FP32 is saved",
            "ctx.save_for_backward(input, weight, bias,",
            "ctx.save_for_backward(input.float(), weight, bias,",
        ),
        ("it computes in 16 bits", "torch.rms_norm(input.float(),", "torch.rms_norm(input,"),
        (
            "the mean of what is pulled is forgotten",
            "normal * (pulled * normal).mean(over, keepdim=True)",
            "normal",
        ),
        (
            "eps is that of 16 bits",
            "torch.finfo(torch.float32).eps if",
            "torch.finfo(input.dtype).eps if",
        ),
    ),
    *engine_mutants(
        "precision/islands.py",
        ("test_norms.py",),
        ("norms are given FP32", "reads_sixteen_bits(module) and module not in chosen", "False"),
        (
            "a norm that is named is left alone",
            "reads_sixteen_bits(module) and module not in chosen",
            "reads_sixteen_bits(module)",
        ),
    ),
    *engine_mutants(
        "precision/weak.py",
        ("test_weak_tensors.py",),
        (
            "a constant makes activations FP32",
            "if _kind(weak) is WeakTensor or name in _PRODUCTS:",
            "if name in _PRODUCTS:",
        ),
        (
            "a product with a running tensor is FP32",
            "if _kind(weak) is WeakTensor or name in _PRODUCTS:",
            "if _kind(weak) is WeakTensor:",
        ),
        (
            "what is written into it is rounded",
            "if _writes(name) and args and _is_weak(args[0]):",
            "if False:",
        ),
        ("out= is rounded", 'if _is_weak(kwargs.get("out")):', "if False:"),
        (
            "a constant is infinite beside 16 bits",
            "return bounded(value, dtype).to(dtype)",
            "return value.to(dtype)",
        ),
        (
            "a conversion is infinite",
            "func(bounded(args[0], result.dtype), *args[1:], **kwargs)",
            "func(args[0], *args[1:], **kwargs)",
        ),
        ("what comes of it is plain", "is_plain and not value.requires_grad", "False"),
        ("activations give way", "is_plain and not value.requires_grad", "is_plain"),
        (
            "operations of others get copies",
            "if isinstance(func, OpOverload | OpOverloadPacket):",
            "if False:",
        ),
    ),
    *engine_mutants(
        "precision/weak.py",
        ("test_cast_model_kept.py",),
        ("a batch norm writes to copies", "elif halves and name in _STATISTICS:", "elif False:"),
    ),
    *engine_mutants(
        "precision/writes.py",
        ("test_weak_tensors.py", "test_cast_model_kept.py", "test_cast_model_buffers.py"),
        (
            "an original that was written over is gone back to",
            "if torch.equal(bounded(original, tensor.dtype).to(tensor.dtype), tensor):",
            "if True:",
        ),
        (
            "views are followed at the wrong place",
            "offset = value.storage_offset() - watched.storage_offset()",
            "offset = 0",
        ),
        ("random numbers are drawn twice", "if names and not copies:", "if names:"),
        (
            "a batch norm in evaluation writes",
            'if not (given.get("training") or given.get("train")):',
            "if False:",
        ),
        ("a batch norm in training writes nothing", 'if "running_mean" not in places:', "if True:"),
    ),
    *engine_mutants(
        "precision/watch.py",
        (
            "test_cast_model_buffers.py",
            "test_cast_model_passes.py",
            "test_cast_model_kept.py",
            "test_cast_model_inputs.py",
        ),
        (
            "a pass in training after one in evaluation is not watched",
            "model.training not in self._seen",
            "not self._seen",
        ),
        (
            "later writes are not noticed",
            "is_half and (is_new or _state(now) != state)",
            "is_half and is_new",
        ),
        (
            "what is bound anew stays in 16 bits",
            "is_half and (is_new or _state(now) != state)",
            "is_half and not is_new and _state(now) != state",
        ),
        (
            "a 16-bit buffer that was put back stays",
            "if name in self._kept and buffer.dtype in SIXTEEN_BIT:",
            "if False:",
        ),
        ("inference mode widens to what cannot be trained", "if new.is_inference():", "if False:"),
        (
            "a checkpointed function sees plain buffers",
            "        self._lend_to_backward(output)\n",
            "",
        ),
        (
            "a failed backward pass keeps buffers",
            "        self._take_back()\n        for name, _, buffer",
            "        for name, _, buffer",
        ),
        (
            "methods of an owner see plain buffers",
            "            lender.before(owner, args)\n",
            "            pass\n",
        ),
        ("weak results leave the model", "return plain_tensors(output)", "return output"),
        ("a batch is named in each pass", "            self._has_named = True\n", ""),
        (
            "the largest number that FP16 holds is named",
            "_INFINITE = 65520.0",
            "_INFINITE = 65504.0",
        ),
        ("infinities of a batch are named", "torch.where(t.isinf(), 0, t.detach())", "t.detach()"),
    ),
    *engine_mutants(
        "precision/casts.py",
        ("test_cast_model_inputs.py",),
        (
            "masks become infinite",
            "if is_dense and not tensor.requires_grad:",
            "if False:",
        ),
        (
            "what carries gradients is clamped",
            "if is_dense and not tensor.requires_grad:",
            "if is_dense:",
        ),
        (
            "infinities of a mask become finite",
            "(narrow == -torch.inf) & (tensor != -torch.inf)",
            "narrow == -torch.inf",
        ),
        ("times are rounded", "if tensor.dim() < 2 and", "if False and"),
        (
            "inner models round times",
            "            return tensor, False\n        # timesteps",
            "            return super()._cast_tensor(tensor)\n        # timesteps",
        ),
    ),
    *engine_mutants(
        "precision/buffers.py",
        ("test_cast_model_buffers.py", "test_cast_model_positions.py", "test_cast_model_kept.py"),
        (
            "numbers in one dimension are cast",
            "if buffer.numel() == 1 and",
            "if buffer.dim() == 0 and",
        ),
        ("codes of known names are cast", "if is_line and any(fnmatch", "if False and any(fnmatch"),
        ("codes of other names are cast", "if is_line and _is_progression(buffer):", "if False:"),
        ("what begins at 0 is a code", "(values > 0).all()", "(values >= 0).all()"),
        ("any line is a code", "is_monotone and max(ends, 1 / ends) >= 16", "is_monotone"),
        (
            "masks are warned of",
            "wide.isfinite() & (wide >= torch.finfo(torch.float16).min)",
            "wide.isfinite()",
        ),
        ("nothing is warned of", "return self.error > ABSOLUTE_BOUND or", "return"),
    ),
    *engine_mutants(
        "precision/rehearsal.py",
        ("test_cast_model_batch.py",),
        ("tables that make activations FP32 are kept", "return found <= fewest", "return True"),
        (
            "one table that does not do has all cast",
            "    for name in rounded:\n",
            "    for name in ():\n",
        ),
        ("Python's generator moves on", "        random.setstate(state)\n", "        pass\n"),
        (
            "the batch itself is used",
            "map_tensors(batch, lambda tensor: tensor.detach().clone())",
            "batch",
        ),
    ),
    *engine_mutants(
        "precision/islands.py",
        ("test_cast_model_keep.py",),
        ("broken modules are cast", "any(isinstance(part, BROKEN) for part in parts)", "False"),
        (
            "losses are rounded",
            "module in outputs or isinstance(module, _Loss)",
            "module in outputs",
        ),
    ),
]
