"""What trains the DeepLabv3+ branches: CPS, its baseline, and the alternatives that its paper discusses."""
