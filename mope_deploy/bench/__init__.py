"""What a bundle costs on this device, measured without torch: what ``mope bench`` runs."""
