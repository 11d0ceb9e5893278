// Before the first paint, so that a dark page never flashes white.
try {
  const chosen = JSON.parse(localStorage.getItem("fdl.settings") || "{}").theme;
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked or broken: the system's theme is used.
}
