"""What an adapter was trained over: its base's quantisation, and what another base changes."""
