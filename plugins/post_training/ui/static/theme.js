// Airflow keeps the chosen color mode in localStorage ("light", "dark" or "system"). A classic script, so
// that it has run before the first paint.
(() => {
  // Inside of a frame the media query would follow the frame's own color-scheme, not the reader's wish.
  const wish = window.parent.matchMedia("(prefers-color-scheme: dark)");

  const apply = () => {
    const chosen = localStorage.getItem("theme");
    const dark = chosen === "dark" || (chosen !== "light" && wish.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.dispatchEvent(new Event("themechange"));
  };
  window.addEventListener("storage", apply);
  wish.addEventListener("change", apply);
  apply();
})();
