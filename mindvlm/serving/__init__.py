"""A server that answers requests in the format of OpenAI's API."""
