// Dark or light theme: the system's on the daemon's page, the palette's in ComfyUI.

/** Follow the system's theme. @param {HTMLElement} root */
export function followSystem(root) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => (root.dataset.theme = dark.matches ? "dark" : "light");
  dark.addEventListener("change", apply);
  apply();
}

/** Follow ComfyUI, which marks the body in dark palettes. @param {HTMLElement} root @returns {() => void} stops following */
export function followComfyUI(root) {
  const apply = () => (root.dataset.theme = document.body.classList.contains("dark-theme") ? "dark" : "light");
  const observer = new MutationObserver(apply);
  observer.observe(document.body, { attributes: true, attributeFilter: ["class"] });
  apply();
  return () => observer.disconnect();
}
