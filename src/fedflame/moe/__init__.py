"""The paper's mechanisms inside a Hugging Face SMoE model, one file each.

`families` finds the MoE layers. `active_experts` sets k. `rescaler` corrects the output for k < K.
`activation_counts` counts the tokens of each expert. `expert_lora` adds LoRA to the experts through the
experts function of transformers. `expert_adamw` trains it. `adapted_model` attaches all of these to one base
model.
"""
