"""The clipped policy loss, its gradient and its statistics over packed rows."""
