"""The first part of README.md: the command, and what each table means."""

INTRODUCTION = """# One card

What training costs on one CUDA card, beside the goals of its design. One command measures all of it, in ten
minutes at most, and needs no network:

    python benchmarks/gpu/run.py

It needs fedflame, a CUDA build of torch with its Triton, and a C compiler, with which Triton builds what
starts its kernels. Without a compiler everything is measured uncompiled.

    python benchmarks/gpu/run.py --stages block,step         # some of the stages; what others found stays
    python benchmarks/gpu/run.py --data dolly-15k.jsonl.gz   # one more run in the last stage, on these rows
    python benchmarks/gpu/run.py --output DIR                # the results go there, not to results/
    python benchmarks/gpu/run.py --render                    # writes this page from the results
    python benchmarks/gpu/run.py --small --output DIR        # tiny sizes, on a CPU: the program works
    python benchmarks/gpu/run.py --small --device cuda --output DIR

The results are a JSON file with the name of the card, which is written after every stage. What the running
stage has found is in a file beside it, complete after every row. Every stage has a process of its own and a
budget of seconds, to which the seconds are added that stages before it have left. A stage that fails, hangs
or exceeds its budget is recorded with what it has found, and the next one runs.

- **ceilings**: one bfloat16 product of three sides of 8192, and a copy: what nothing on the card can pass.
- **correctness**: the experts against a loop in float64, in three number formats, at k = 8 and 1, with
  experts that have no token, and with NaN in all memory that is handed out; Triton's products; masked AdamW;
  compiled steps against eager ones; waits.
- **products**: grouped products alone, by torch and by Triton: what the columns for LoRA cost.
- **block**: one MoE block, forward and backward, beside other ways.
- **step**: whole training steps, their launches and waits, and the kernels of the first.
- **parts**: optimizer, head, routing, and the banks' way into the products, each alone.
- **losses**: steps and whole runs on the card, and the same on the CPU.

Times are from CUDA events, and medians. Everything runs before it is timed: no time holds compilation. Every
stage that shows a share of the large product's rate has measured that rate itself.

What the tables say:

- **Goals.** What was measured, beside each bar.
- **Grouped products.** *gate_up, 2080 deep* multiplies with gate and up and with the 32 columns of their
  LoRA, 2048 without these, and 2112 with 64. *triton* is what a card runs on which torch's product is a loop
  over the experts.
- **One block.** OLMoE-1B-7B's (64 experts, H = 2048, I = 1024), r = 16, bfloat16, random weights, even load.
  *ours* is what training runs, *ours-eager* the same with nothing compiled, *composed* split LoRA under
  autograd beside the base's own weights, *peft* PEFT's `target_parameters`, *frozen* the block without LoRA.
  What ends in *-captured* is the same as a CUDA graph, as training runs whole steps. The share counts the
  base's arithmetic alone: 12 S H I for S = tokens times k. The last number is the time over that of ours,
  captured or not.
- **Whole steps.** OLMoE-1B-7B, 16 layers, random weights; rows of 512 tokens, all labelled but the first of
  each; LoRA on experts and attention; AdamW. The routing uses all experts, as that of a trained model does.
  FLOPs are those of `fedflame plan`; what checkpointing computes again is not among them. *Peak* is what a
  step takes beyond model, adapter and moments. *Launched* says how: *captured* is what training does from the
  third step of the same sizes on, *compiled* what it does before, *eager* what it does where a compiler is
  missing. *Launches* are kernels; *idle* is the share of the step in
  which neither a kernel nor a copy runs; *waits* is how often the program waits for the card; *warm-up* is
  the first two steps, with compilation.
- **Losses.** The embedded model in float32 on generated rows, step by step on the same batches; then
  `fedflame run` on both devices, side by side.
"""
