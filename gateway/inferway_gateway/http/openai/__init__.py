"""The routes under ``/v1``: text models in the shape of OpenAI's API."""
