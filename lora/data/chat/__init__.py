"""Chats to text: the template, its limits, the assistant's turns in it, prompts to answer."""
