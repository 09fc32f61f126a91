"""What two papers claim, asked again at a scale that one GPU does in minutes; benchmarks/REPRODUCTION.md has it all."""
