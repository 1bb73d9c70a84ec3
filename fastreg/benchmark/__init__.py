"""``fastreg bench``: whole training steps, ours and those one would write without us, timed together."""
