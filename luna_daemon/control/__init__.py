"""The control process: connections, requests, and the state that answers them."""
