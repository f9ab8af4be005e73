"""Adaptive length by reinforcement learning: rollouts on one trajectory a prompt, reward, GRPO."""
