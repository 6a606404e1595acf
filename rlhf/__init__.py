"""rlhf: SFT, reward model, PPO, GRPO and DPO as one pipeline of commands."""

__version__ = "0.1.0"
