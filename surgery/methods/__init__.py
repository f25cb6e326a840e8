"""One module per adapter method: its weight change, its start, its PEFT configuration, its parameter names."""
