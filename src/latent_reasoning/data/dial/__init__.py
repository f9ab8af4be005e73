"""The laptop experiment's task: problems on a dial, their texts and their tokenizer."""
