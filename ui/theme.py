"""The look: quiet greys and one accent, light and dark, so that the pictures are the colour on the page."""

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes

CSS = Path(__file__).with_name("studio.css")


def studio_theme():
    """The theme, on Gradio's base. Its typeface comes with Gradio, whose weight 600 lacks most Latin letters."""
    return gr.themes.Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_lg,
        text_size=sizes.text_md,
        font=(fonts.LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(fonts.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="700",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_400",
        input_placeholder_color_dark="*neutral_500",
        input_shadow_focus="0 0 0 3px color-mix(in srgb, *primary_500 22%, transparent)",
        button_primary_background_fill="*neutral_900",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_background_fill_dark="*neutral_100",
        button_primary_background_fill_hover_dark="white",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_900",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_200",
        button_secondary_border_color_dark="*neutral_700",
        button_cancel_background_fill="white",
        button_cancel_background_fill_hover="#fef2f2",
        button_cancel_background_fill_dark="*neutral_900",
        button_cancel_background_fill_hover_dark="#2a1515",
        button_cancel_border_color="#fca5a5",
        button_cancel_border_color_dark="#7f1d1d",
        button_cancel_text_color="#b91c1c",
        button_cancel_text_color_dark="#fca5a5",
        button_primary_border_color="*neutral_900",
        button_primary_border_color_dark="*neutral_100",
        button_large_text_weight="700",
        button_border_width="1px",
        button_large_radius="*radius_lg",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
