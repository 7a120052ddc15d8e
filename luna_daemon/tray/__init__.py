"""The tray icon: what is shown, the image, and the watch over the daemon's process."""
