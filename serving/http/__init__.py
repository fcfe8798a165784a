"""HTTP: admission at the door, the routes, and their OpenAPI document.

What lives here parses requests and formats answers; what both protocols do with a request is
`penumbra.serving.gateway`'s, and nothing here computes one.
"""
