// The API's description; relative addresses, so that it works behind a proxy's prefix too.
window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: true,
  validatorUrl: null,
  presets: [window.SwaggerUIBundle.presets.apis],
});
