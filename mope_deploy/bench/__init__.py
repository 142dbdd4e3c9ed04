"""What a bundle costs on this device, measured without torch: what ``mope bench`` runs.

``measure`` runs it, ``timing`` is how calls are timed, ``board`` and ``nvml`` read what the board tells about itself,
``energy`` integrates its power, ``plot`` draws.
"""
