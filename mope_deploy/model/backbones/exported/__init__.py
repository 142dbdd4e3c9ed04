"""What a layer becomes in an exported graph, where that differs from what it computes elsewhere."""
