// Light, dark, or as the system says. Runs before the page is drawn, so that it does not flash.
(() => {
  const NAME = "kvstore-theme";
  const themes = ["auto", "light", "dark"];
  const read = () => themes.find((theme) => theme === localStorage.getItem(NAME)) ?? "auto";
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  window.theme = {
    current: read,
    next() {
      const theme = themes[(themes.indexOf(read()) + 1) % themes.length];
      localStorage.setItem(NAME, theme);
      show(theme);
      return theme;
    },
  };
  show(read());
})();
