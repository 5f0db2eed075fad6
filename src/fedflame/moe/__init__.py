"""The paper's mechanisms inside a Hugging Face SMoE model, one file each.

`families` finds the MoE layers, `active_experts` sets k, `rescaler` corrects the output for k < K,
`activation_counts` counts what each expert saw, `expert_lora` adds the low-rank banks through the
one experts function of transformers, `expert_adamw` trains them, and `adapted_model` holds one
resident base model with all of these attached.
"""
